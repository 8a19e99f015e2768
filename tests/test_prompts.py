"""Every public path from a problem with a prompt sees the prompt: it gives what the prior with the
prompt written into it gives, which is no number of the prior without it.
"""

import copy

import pytest
import torch

import klrl_edu as klrl
from klrl_edu import testing
from tests.models.toys import BigramToy, PromptedToy, words

SPACE = words(2, 3)
PROMPT = torch.tensor([1, 1])
REWARD = klrl.count_reward("a", SPACE)


class Written(BigramToy):
    """A PromptedToy into which the prompt is written: a model of its own that reads none."""

    def __init__(self, prompt, seed=0):
        super().__init__(SPACE, seed)
        self.inner, self.prompt = PromptedToy(SPACE, seed), prompt

    def forward(self, tokens, prompt=None):
        return self.inner(tokens, self.prompt.expand(len(tokens), -1))


def asked(prompt="b b", seed=0):
    """A problem with a prompt, and the same with the prompt written into its prior."""
    plain = klrl.Problem(PromptedToy(SPACE, seed), REWARD, 0.5, prompt)
    return plain, klrl.Problem(Written(plain.prompt, seed), REWARD, 0.5)


def numbers(comparison):
    return [value for value in comparison.metrics().values() if value is not None]


def policies():
    """A network that reads prompts, and the same with the prompt written in."""
    return PromptedToy(SPACE, 3), Written(PROMPT, 3)


def test_the_prompt_makes_a_difference():
    prompted, _ = asked()
    without = klrl.Problem(prompted.prior, REWARD, 0.5)
    assert abs(klrl.posterior(prompted).value - klrl.posterior(without).value) > 0.01


@pytest.mark.parametrize("method", ["enumeration", "soft_bellman"])
def test_the_posterior_is_that_of_the_prompt_and_compares_both_ways(method):
    prompted, written = asked()
    target, expected = klrl.posterior(prompted, method), klrl.posterior(written, method)
    assert target.value == pytest.approx(float(expected.value), rel=1e-14)
    assert torch.allclose(target.log_probs, expected.log_probs, rtol=0, atol=1e-14)
    policy, inner = policies()
    for options in ({}, {"n": 40, "draw": klrl.seeded_draw(1)}):
        again = options | ({"draw": klrl.seeded_draw(1)} if options else {})
        mine, theirs = (
            klrl.compare(policy, target, **options),
            klrl.compare(inner, expected, **again),
        )
        assert numbers(mine) == pytest.approx(numbers(theirs), rel=1e-12)
    for model in (target.model, klrl.looked_up(target).prior):
        assert klrl.compare(model, target).reverse_kl < 1 or model is not target.model
    assert klrl.compare(target.model, target).reverse_kl == pytest.approx(0, abs=1e-14)
    sampled = klrl.compare(target.model, target, n=20, draw=klrl.seeded_draw(0))
    assert sampled.reverse_kl == pytest.approx(0, abs=1e-14)


def test_forward_backward_keeps_the_prompt_of_a_prior_that_is_bound_to_it():
    prior = klrl.NGramModel(SPACE, 2).for_prompt("b b")
    problem = klrl.Problem(
        prior, klrl.automata.accept_reward(klrl.automata.at_least("a", 1, SPACE)), 1.0, PROMPT
    )
    target = klrl.posterior(problem, "forward_backward")
    assert target.model.own_prompt == (1, 1)
    assert klrl.compare(target.model, klrl.posterior(problem)).reverse_kl == pytest.approx(
        0, abs=1e-14
    )
    refuses(target.model, problem)


def refuses(model, problem):
    """Another prompt, at every door of a model."""
    other, tokens = torch.tensor([0]), SPACE.all_tokens()
    for ask in (
        lambda: model.start(1, other[None]),
        lambda: model.sample(2, draw=klrl.seeded_draw(0), prompt=other),
        lambda: klrl.sample(model, 2, draw=klrl.seeded_draw(0), prompts=other[None]),
        lambda: klrl.enumerate_support(model, prompt=other),
        lambda: klrl.conditional_log_probs(model, tokens, other),
        lambda: klrl.sequence_log_probs(model, tokens, other),
    ):
        with pytest.raises(klrl.InputError, match=r"'b b'.*'a'|'a'.*'b b'"):
            ask()
    own = model.sample(2, draw=klrl.seeded_draw(0), prompt=problem.prompt)
    padded = torch.cat([torch.tensor([-1]), problem.prompt])
    assert torch.equal(model.log_prob(own, problem.prompt), model.log_prob(own, padded))


@pytest.mark.parametrize("method", ["enumeration", "soft_bellman"])
def test_a_posteriors_table_belongs_to_its_prompt(method):
    prompted, _ = asked()
    refuses(klrl.posterior(prompted, method).model, prompted)
    refuses(copy.deepcopy(klrl.posterior(prompted, method).model), prompted)
    refuses(klrl.looked_up(klrl.posterior(prompted, method)).prior, prompted)
    refuses(klrl.feasible_prior(prompted), prompted)
    refuses(klrl.feasible_prior([prompted]), prompted)


def test_a_table_of_one_prompt_is_not_compared_with_the_posterior_of_another():
    mine, other = (klrl.posterior(asked(prompt)[0]) for prompt in ("b b", "a"))
    sequences = klrl.posterior(asked("b b")[0], "enumeration").model
    for model in (mine.model, sequences, klrl.looked_up(mine).prior):
        with pytest.raises(klrl.InputError, match="belongs to the prompt 'b b', and was given 'a'"):
            klrl.compare(model, other)
    with pytest.raises(klrl.InputError, match="reads no prompt"):
        klrl.compare(BigramToy(SPACE), other)


class SilentStart(BigramToy):
    """Drops a prompt where decoding starts, as a model of one's own may."""

    def start(self, n, prompt=None):
        return super().start(n)


def test_a_model_of_ones_own_that_forgets_to_ask_is_asked_by_the_functions_of_the_contract():
    for ask in (
        lambda model: model.sample(2, draw=klrl.seeded_draw(0), prompt=PROMPT),
        lambda model: klrl.enumerate_support(model, prompt=PROMPT),
        lambda model: trained(model, asked()[0], steps=1),
    ):
        with pytest.raises(klrl.InputError, match="SilentStart reads no prompt"):
            ask(SilentStart(SPACE))


def test_looking_up_keeps_the_prompt_and_trains_to_the_posterior_of_the_problem():
    prompted, _ = asked()
    target = klrl.posterior(prompted)
    table = klrl.looked_up(target)
    assert table.prompt.tolist() == [1, 1]
    assert klrl.posterior(table).value == pytest.approx(float(target.value), rel=1e-14)
    policy = klrl.TransformerModel(SPACE, width=8, heads=2, layers=1, max_prompt=2)
    both = [
        klrl.train(
            copy.deepcopy(policy),
            problem,
            klrl.losses.exact,
            steps=30,
            draw=klrl.seeded_draw(0),
            target=target,
        )
        for problem in (prompted, table)
    ]
    assert both[1]["reverse_kl"][-1] == pytest.approx(both[0]["reverse_kl"][-1], rel=1e-9)
    assert both[0]["reverse_kl"][-1] < both[0]["reverse_kl"][0] / 2


def test_audits_read_the_prompt():
    prompted, written = asked()
    policy, inner = policies()
    mine = klrl.audit_gradient(klrl.losses.rloo, policy, prompted, batch_size=2)
    theirs = klrl.audit_gradient(klrl.losses.rloo, inner, written, batch_size=2)
    assert float(mine.variance) == pytest.approx(float(theirs.variance), rel=1e-9)
    for mean in (mine.mean, mine.targets["objective"]):
        assert float(mean.norm()) == pytest.approx(float(theirs.mean.norm()), rel=1e-9)
    values = [
        klrl.audit_value(klrl.kl_values.k3, one, problem)
        for one, problem in ((policy, prompted), (inner, written))
    ]
    assert float(values[0].mean) == pytest.approx(float(values[1].mean), rel=1e-12)
    for audit, what in (
        (klrl.audit_gradient, klrl.losses.rloo),
        (klrl.audit_value, klrl.kl_values.k3),
    ):
        with pytest.raises(klrl.InputError, match="BigramToy reads no prompt, and was given 'b b'"):
            audit(what, BigramToy(SPACE), prompted, batch_size=2)


def trained(policy, problem, loss=klrl.losses.rloo, **options):
    return klrl.train(policy, problem, loss, draw=klrl.seeded_draw(0), **options)


def test_training_on_samples_reads_the_prompt_and_refuses_a_policy_that_does_not():
    prompted, written = asked()
    policy, inner = policies()
    mine = trained(policy, prompted, steps=3, batch_size=8)
    theirs = trained(inner, written, steps=3, batch_size=8)
    for name in ("kl", "reward", "objective"):
        assert mine[name] == pytest.approx(theirs[name], rel=1e-9)
    for loss in (klrl.losses.rloo, klrl.losses.exact):
        with pytest.raises(klrl.InputError, match="BigramToy reads no prompt, and was given 'b b'"):
            trained(BigramToy(SPACE), prompted, loss, steps=1)


def hard(prior, forbidden, prompt):
    """−inf for texts that hold a word."""
    reward = klrl.text_reward(lambda text: -torch.inf if forbidden in text else len(text), SPACE)
    return klrl.Problem(prior, reward, 1.0, prompt)


def test_hard_rewards_of_two_prompts_restrict_one_policy_by_prompt():
    prior = PromptedToy(SPACE)
    problems = [hard(prior, "a", "b"), hard(prior, "b", "a a")]
    policy = klrl.restrict_to_support(PromptedToy(SPACE, 5), klrl.feasible_prior(problems))
    targets = [klrl.posterior(problem) for problem in problems]
    for problem, target in zip(problems, targets, strict=True):
        feasible = target.support.tokens[target.support.rewards > -torch.inf]
        seen = klrl.enumerate_support(policy, prompt=problem.prompt)
        assert torch.equal(seen.tokens, feasible)
    assert klrl.compare(policy, targets).mean["violating_mass"] == 0
    both = torch.tensor([[-1, 1], [0, 0]])
    tokens = klrl.sample(policy, 20, draw=klrl.seeded_draw(0), prompts=both)
    assert torch.isfinite(
        klrl.sequence_log_probs(policy, tokens, both.repeat_interleave(20, 0))
    ).all()
    history = klrl.train(
        policy,
        problems,
        klrl.losses.exact,
        steps=60,
        draw=klrl.seeded_draw(0),
        target=targets,
        lr=0.1,
    )
    assert history["reverse_kl"][-1] < history["reverse_kl"][0] / 2
    assert history["violating_mass"] == [0, 0]
    with pytest.raises(klrl.InputError, match="no model belongs to the prompt 'b b'"):
        policy.sample(1, draw=klrl.seeded_draw(0), prompt=torch.tensor([1, 1]))
    with pytest.raises(klrl.InputError, match="no model belongs to the prompt ''"):
        policy.sample(1, draw=klrl.seeded_draw(0))


def test_a_reference_to_which_prompts_say_nothing_restricts_under_every_prompt():
    policy = klrl.restrict_to_support(
        PromptedToy(SPACE), klrl.SequenceTable.from_texts({"a": 0.5, "b a": 0.5}, space=SPACE)
    )
    for prompt in (None, torch.tensor([0]), PROMPT):
        assert klrl.enumerate_support(policy, prompt=prompt).texts == ["a", "b a"]


def test_models_by_prompt_are_each_their_own():
    tables = [klrl.posterior(asked(prompt)[0]).model for prompt in ("a", "b b")]
    model = klrl.PromptedModels(tables)
    tokens = SPACE.all_tokens()
    rows = torch.tensor([[-1, 0], [1, 1]])[torch.arange(len(tokens)) % 2]
    expected = torch.where(rows[:, 0] < 0, *(table.log_prob(tokens) for table in tables))
    assert torch.allclose(model.log_prob(tokens, rows), expected, rtol=0, atol=1e-14)
    with pytest.raises(klrl.InputError, match="two of the models belong to one prompt"):
        klrl.PromptedModels([tables[0], tables[0]])
    with pytest.raises(klrl.InputError, match="models is empty"):
        klrl.PromptedModels([])
    testing.check_language_model(model, torch.tensor([0]))
    testing.check_language_model(model, rows, tokens=tokens)


def test_a_prompt_as_text_is_its_words():
    prompted, _ = asked("b a b")
    assert prompted.prompt.tolist() == [1, 0, 1]
    assert "prompt='b a b'" in repr(prompted)
    with pytest.raises(klrl.InputError, match="word 'c' is not in the vocabulary"):
        asked("b c")
    with pytest.raises(klrl.InputError, match=r"prompt has shape \[1, 2\]"):
        asked(torch.zeros(1, 2, dtype=torch.long))
    with pytest.raises(klrl.InputError, match=r"prompt is a tensor \[2\]; expected token ids"):
        asked(torch.zeros(2))


def test_a_prompt_without_words_is_none():
    """For models that read prompts and for those that read none; so is one of padding only."""
    tokens = SPACE.all_tokens()
    for model in (PromptedToy(SPACE), BigramToy(SPACE), klrl.RecurrentModel(SPACE, hidden_size=4)):
        problem, without = klrl.Problem(model, REWARD, 1.0, ""), klrl.Problem(model, REWARD, 1.0)
        assert klrl.posterior(problem).value == klrl.posterior(without).value
        alone = model.log_prob(tokens)
        for prompt in (problem.prompt, torch.full((2,), -1), torch.full((len(tokens), 2), -1)):
            assert torch.equal(model.log_prob(tokens, prompt), alone)
    tables = klrl.PromptedModels([BigramToy(SPACE), BigramToy(SPACE, 1).for_prompt("a")])
    assert torch.equal(tables.log_prob(tokens), BigramToy(SPACE).log_prob(tokens))
    assert torch.equal(
        tables.log_prob(tokens, torch.empty(len(tokens), 0)), BigramToy(SPACE).log_prob(tokens)
    )

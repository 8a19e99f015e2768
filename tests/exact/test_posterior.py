"""What `posterior` returns: the method, the model, and its printed forms."""

import math

import pytest
import torch

from klrl_edu.core.errors import InfeasibleError, InputError
from klrl_edu.core.spaces import SequenceSpace
from klrl_edu.exact.posterior import Posterior, feasible_prior, looked_up, posterior
from klrl_edu.models.contract import conditional_log_probs, enumerate_support
from klrl_edu.models.hmm import HiddenMarkovModel
from klrl_edu.models.ngram import NGramModel
from klrl_edu.models.recurrent import RecurrentModel
from klrl_edu.models.table import PrefixTable, SequenceTable
from klrl_edu.problems.automata import at_least, constraint, exactly
from klrl_edu.problems.examples import four_sentences, surnames
from klrl_edu.problems.problem import Problem
from klrl_edu.problems.rewards import add, count_reward, table_reward, text_reward


@pytest.mark.parametrize(
    ("method", "taken", "kind"),
    [
        ("auto", "enumeration", SequenceTable),
        ("enumeration", "enumeration", SequenceTable),
        ("soft_bellman", "soft_bellman", PrefixTable),
    ],
)
def test_it_says_which_method_it_took(method, taken, kind):
    target = posterior(four_sentences(), method)
    assert target.method == taken
    assert isinstance(target.model, kind)
    assert f"by {taken}" in str(target)


def test_an_unknown_method_lists_the_known_ones():
    with pytest.raises(InputError, match=r"'magic'.*enumeration, soft_bellman"):
        posterior(four_sentences(), "magic")


def test_auto_says_the_prefix_trie_for_a_network_with_an_automatons_reward():
    space = SequenceSpace(("a", "b"), 3)
    network = RecurrentModel(space, hidden_size=4)
    assert posterior(Problem(network, count_reward("a", space), 1.0)).method == "soft_bellman"
    assert (
        posterior(Problem(network, constraint(at_least("a", 1, space)), 1.0)).method
        == "soft_bellman"
    )
    assert posterior(Problem(network, text_reward(len, space), 1.0)).method == "enumeration"
    assert (
        posterior(Problem(NGramModel(space, 2), count_reward("a", space), 1.0)).method
        == "enumeration"
    )
    assert (
        posterior(
            Problem(NGramModel(space, 2), count_reward("a", space), 1.0), max_sequences=3
        ).method
        == "forward_backward"
    )


@pytest.mark.parametrize("method", ["enumeration", "soft_bellman"])
def test_the_model_is_a_language_model_with_the_posteriors_mass(method):
    target = posterior(four_sentences(0.5), method)
    seen = enumerate_support(target.model)
    assert torch.equal(seen.tokens, target.enumerated().tokens)
    assert seen.log_weights.tolist() == pytest.approx(target.log_probs.tolist(), abs=1e-14)


def test_rows_come_by_falling_probability():
    rows = posterior(four_sentences()).rows()
    assert [row[0] for row in rows] == ["the cat", "a dog", "the dog", "a cat"]
    assert rows[1][1:] == pytest.approx((0.1, 2.0, 0.317642414206), abs=5.1e-13)
    assert len(posterior(four_sentences()).rows(2)) == 2


def test_long_tables_are_cut_in_print_and_whole_in_rows():
    target = posterior(surnames(count=25))
    assert "… and 15 more" in str(target)
    assert len(target.rows()) == 25
    assert "<table>" in target._repr_html_()
    assert target.to_dict() == {"kl_coef": 1.0, "method": "enumeration", "support_size": 25} | {
        "value": float(target.value),
        "log_evidence": float(target.log_evidence),
    }


@pytest.mark.parametrize("kl_coef", [0.0, 0.5, math.inf])
def test_the_feasible_prior_is_the_prior_given_that_nothing_is_forbidden(kl_coef):
    base = four_sentences()
    hard = table_reward(
        {"the cat": 1.0, "the dog": -math.inf, "a cat": 0.0, "a dog": 2.0}, base.space
    )
    prior = feasible_prior(Problem(base.prior, hard, kl_coef))
    assert sorted(base.space.decode(prior.tokens)) == ["a cat", "a dog", "the cat"]
    assert sorted(prior.log_probs.exp().tolist()) == pytest.approx([1 / 7, 2 / 7, 4 / 7], abs=1e-15)
    with pytest.raises(InfeasibleError):
        feasible_prior(
            Problem(
                base.prior, lambda tokens, prompt: torch.full((len(tokens),), -math.inf), kl_coef
            )
        )


def test_a_posterior_without_its_support_says_what_to_do():
    whole = posterior(four_sentences())
    bare = Posterior(whole.problem, whole.model, whole.value, whole.log_evidence, "elsewhere")
    with pytest.raises(InputError, match=r"by elsewhere, without enumerating.*compare"):
        _ = bare.log_probs
    assert "λ log Z" in str(bare)
    assert bare.to_dict()["support_size"] is None


def test_looking_up_gives_the_same_conditionals_and_rewards():
    target = posterior(surnames(count=25))
    tokens, table = target.enumerated().tokens, looked_up(target)
    expected = conditional_log_probs(target.problem.prior, tokens)
    torch.testing.assert_close(
        conditional_log_probs(table.prior, tokens), expected, rtol=0, atol=1e-13
    )
    assert torch.equal(table.token_rewards(tokens), target.problem.token_rewards(tokens))
    assert float(posterior(table).log_evidence) == pytest.approx(
        float(target.log_evidence), abs=1e-14
    )


def test_what_was_not_enumerated_is_not_looked_up():
    target = posterior(four_sentences())
    space = target.problem.space
    stray = space.all_tokens()[
        ~(space.all_tokens()[:, None] == target.enumerated().tokens).all(-1).any(-1)
    ]
    assert bool((looked_up(target).prior.log_prob(stray) == -math.inf).all())
    with pytest.raises(InputError, match="is nan"):
        looked_up(target).token_rewards(stray)


@pytest.mark.parametrize("method", ["enumeration", "soft_bellman", "forward_backward"])
def test_sums_of_decimals_that_rounding_splits_tie_at_zero(method):
    """Each order of .1 + .2 + .3 is one of six best texts, whichever way it is added."""
    space = SequenceSpace(("a", "b", "c"), 3, eos=False)
    worth = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    letters = add(*(count_reward(word, space, float(worth[k])) for k, word in enumerate("abc")))
    once = constraint(exactly("a", 1, space) & exactly("b", 1, space) & exactly("c", 1, space))
    target = posterior(Problem(NGramModel(space, 1), add(letters, once), 0.0), method)
    orders = space.encode(["a b c", "a c b", "b a c", "b c a", "c a b", "c b a"])
    assert target.model.log_prob(orders).exp().tolist() == pytest.approx([1 / 6] * 6, abs=1e-15)
    assert float(target.value) == pytest.approx(0.6, rel=1e-15)


@pytest.mark.parametrize("method", ["soft_bellman", "forward_backward"])
def test_rewards_that_differ_by_more_than_rounding_are_no_tie(method):
    space = SequenceSpace(("a", "b"), 2, eos=False)
    reward = add(count_reward("a", space, 0.1), count_reward("b", space, 0.1 + 1e-15))
    target = posterior(Problem(NGramModel(space, 1), reward, 0.0), method)
    assert target.model.log_prob(space.encode(["b b"])).exp().tolist() == [1.0]


def test_hidden_contexts_tie_as_words_do():
    space = SequenceSpace(("a", "b", "c"), 3, eos=False)
    reward = add(
        *(count_reward(word, space, 0.1 * (k + 1)) for k, word in enumerate("abc")),
        constraint(exactly("a", 1, space) & exactly("b", 1, space) & exactly("c", 1, space)),
    )
    problem = Problem(HiddenMarkovModel.random(space, 2, seed=3), reward, 0.0)
    hidden, listed = (posterior(problem, method) for method in ("forward_backward", "enumeration"))
    tokens = listed.enumerated().tokens
    assert int((listed.log_probs > -math.inf).sum()) == 6
    torch.testing.assert_close(
        hidden.model.log_prob(tokens).exp(), listed.log_probs.exp(), rtol=1e-13, atol=1e-15
    )

"""The slips of a first session, typed on purpose: each is answered with what was given, what
belongs there, and the remedy.
"""

import numpy as np
import pytest
import torch

import klrl_edu as klrl

PROBLEM = klrl.four_sentences()
SPACE, PRIOR = PROBLEM.space, PROBLEM.prior
TARGET = klrl.posterior(PROBLEM)
DRAW = klrl.seeded_draw(0)


def policy():
    return klrl.RecurrentModel(SPACE, hidden_size=4)


class Spaceless(klrl.LanguageModel):
    def forward(self, tokens, prompt=None):
        return torch.zeros(*tokens.shape, 4)


def by_text(text):
    return text.count("cat")


def by_tokens(tokens):
    return tokens.sum(-1)


def ask(reward):
    return klrl.Problem(PRIOR, reward, 1.0)


def train(*arguments, draw=DRAW):
    return klrl.train(*arguments, steps=1, batch_size=2, draw=draw)


# what was typed, what the message says, and the remedy that it ends in
SLIPS = {
    "compare(target, policy)": (
        lambda: klrl.compare(TARGET, policy()),
        r"compare\(policy, target\): policy is a Posterior; expected a model",
        "Did you swap policy and target",
    ),
    "compare(policy, problem)": (
        lambda: klrl.compare(policy(), PROBLEM),
        "target is a Problem; expected a posterior",
        r"which posterior\(problem\) gives",
    ),
    "compare(problem, target)": (
        lambda: klrl.compare(PROBLEM, TARGET),
        "policy is a Problem; expected a model",
        r"Did you mean its \.prior",
    ),
    "compare(policy, target, draw=0)": (
        lambda: klrl.compare(policy(), TARGET, n=4, draw=0),
        "draw is the number 0; expected the source of randomness",
        r"draw=seeded_draw\(0\)",
    ),
    "a generator as draw": (
        lambda: klrl.sample(policy(), 4, draw=torch.Generator()),
        "draw is a Generator",
        r"draw=seeded_draw\(generator\)",
    ),
    "sample(problem)": (
        lambda: klrl.sample(PROBLEM, 4, draw=DRAW),
        r"sample\(model, n\): model is a Problem",
        r"its \.prior",
    ),
    "sample(…, draw=7)": (
        lambda: policy().sample(4, draw=7),
        "draw is the number 7",
        r"draw=seeded_draw\(7\)",
    ),
    "posterior(prior)": (
        lambda: klrl.posterior(PRIOR),
        r"posterior\(problem\): problem is a SequenceTable; expected",
        r"Problem\(prior, reward, kl_coef\)",
    ),
    "posterior([problem])": (
        lambda: klrl.posterior([PROBLEM]),
        "problem is a list of Problem",
        "one of them at a time",
    ),
    "feasible_prior(prior)": (
        lambda: klrl.feasible_prior(PRIOR),
        "problem is a SequenceTable",
        r"Problem\(prior, reward, kl_coef\), or a list",
    ),
    "looked_up(problem)": (
        lambda: klrl.looked_up(PROBLEM),
        "target is a Problem",
        r"posterior\(problem\)",
    ),
    "audit_gradient(policy, loss)": (
        lambda: klrl.audit_gradient(policy(), klrl.losses.rloo, PROBLEM),
        "policy is the function rloo; expected a model",
        "Did you swap policy and loss",
    ),
    "audit_gradient(loss, problem, policy)": (
        lambda: klrl.audit_gradient(klrl.losses.rloo, PROBLEM, policy()),
        "policy is a Problem; expected a model",
        "Did you swap policy and source",
    ),
    "audit_gradient('rloo')": (
        lambda: klrl.audit_gradient("rloo", policy(), PROBLEM),
        "loss is the text 'rloo'; expected a function",
        r"such as losses\.rloo",
    ),
    "audit_value('k3')": (
        lambda: klrl.audit_value("k3", policy(), PROBLEM),
        "estimator is the text 'k3'; expected a function",
        r"such as kl_values\.k3",
    ),
    "audit_value(policy, policy)": (
        lambda: klrl.audit_value(PRIOR, PRIOR, PROBLEM),
        "estimator is a SequenceTable; expected a function",
        r"such as kl_values\.k3",
    ),
    "a draw that is none, in an audit": (
        lambda: klrl.audit_value(
            klrl.kl_values.k1, PRIOR, PROBLEM, monte_carlo=40, draw=0, bound=1.0
        ),
        "draw is the number 0",
        r"draw=seeded_draw\(0\)",
    ),
    "a reward of the text": (
        lambda: ask(by_text),
        r"reward 'by_text' takes \(text\); expected \(tokens, prompt\)",
        r"text_reward\(fn, space\)",
    ),
    "a lambda of the text": (
        lambda: ask(lambda text: len(text)),
        r"reward '<lambda>' takes \(text\)",
        r"text_reward\(fn, space\)",
    ),
    "reward(tokens) without prompt": (
        lambda: ask(by_tokens),
        r"reward 'by_tokens' takes \(tokens\)",
        "add prompt=None",
    ),
    "a number as reward": (
        lambda: ask(1.0),
        "reward is the number 1.0; expected a function of",
        r"text_reward\(fn, space\)",
    ),
    "a prompt in words that the space does not have": (
        lambda: klrl.Problem(policy(), PROBLEM.reward, 1.0, "hello"),
        "word 'hello' is not in the vocabulary",
        "add it",
    ),
    "a prompt that is a number": (
        lambda: klrl.Problem(policy(), PROBLEM.reward, 1.0, 3),
        "prompt is the number 3",
        r"token ids \[S\], whole numbers, or a text",
    ),
    "a prompt for a table": (
        lambda: klrl.Problem(PRIOR, PROBLEM.reward, 1.0, "the"),
        "SequenceTable reads no prompt, and was given 'the'",
        r"model\.for_prompt\(prompt\)",
    ),
    "a network of torch as policy": (
        lambda: klrl.compare(torch.nn.Linear(2, 2), TARGET),
        "policy is a Linear; expected a model",
        "a subclass of LanguageModel",
    ),
    "a class instead of a model": (
        lambda: klrl.Problem(klrl.RecurrentModel, PROBLEM.reward, 1.0),
        "prior is the class RecurrentModel",
        "Make one: RecurrentModel",
    ),
    "a network of torch, restricted": (
        lambda: klrl.restrict_to_support(torch.nn.Linear(2, 2), PRIOR),
        r"restrict_to_support\(policy, reference\): policy is a Linear",
        "a subclass of LanguageModel",
    ),
    "a model without space": (
        lambda: klrl.compare(Spaceless(), TARGET),
        "policy, a Spaceless, has no space",
        r"set self\.space = SequenceSpace",
    ),
    "a model without space, scored": (
        lambda: klrl.sequence_log_probs(Spaceless(), TARGET.support.tokens),
        "model, a Spaceless, has no space",
        r"set self\.space = SequenceSpace",
    ),
    "conditionals of a posterior": (
        lambda: klrl.conditional_log_probs(TARGET, TARGET.support.tokens),
        "model is a Posterior",
        r"its \.model",
    ),
    "the support of a problem": (
        lambda: klrl.enumerate_support(PROBLEM),
        "model is a Problem",
        r"its \.prior",
    ),
    "a text among numbers": (
        lambda: klrl.kl_values.k3("u"),
        "log_ratio is the text 'u'; expected numbers",
        "an array or a list",
    ),
    "rows of different lengths": (
        lambda: klrl.kl_values.k3([[1.0], [1.0, 2.0]]),
        "log_ratio is a list of list; expected numbers",
        "an array or a list",
    ),
}

TRAINING_SLIPS = {
    "train(problem, policy)": (
        lambda: train(PROBLEM, policy(), klrl.losses.rloo),
        "policy is a Problem; expected a model",
        "Did you swap policy and (problem|source)",
    ),
    "train(policy, target)": (
        lambda: train(policy(), TARGET, klrl.losses.rloo),
        "problem is a Posterior",
        r"its \.problem",
    ),
    "loss='rloo'": (
        lambda: train(policy(), PROBLEM, "rloo"),
        "loss is the text 'rloo'; expected a function",
        r"such as losses\.rloo",
    ),
    "draw=0": (
        lambda: train(policy(), PROBLEM, klrl.losses.rloo, draw=0),
        "draw is the number 0",
        r"draw=seeded_draw\(0\)",
    ),
    "a network of torch": (
        lambda: train(torch.nn.Linear(2, 2), PROBLEM, klrl.losses.rloo),
        "policy is a Linear",
        "a subclass of LanguageModel",
    ),
    "a model without space, trained": (
        lambda: train(Spaceless(), PROBLEM, klrl.losses.rloo),
        "a Spaceless, has no space",
        r"set self\.space = SequenceSpace",
    ),
}


@pytest.mark.parametrize(("slip", "given", "remedy"), SLIPS.values(), ids=SLIPS)
def test_a_slip_is_answered_with_what_was_given_and_a_remedy(slip, given, remedy):
    with pytest.raises(klrl.InputError, match=f"(?s){given}.*{remedy}"):
        slip()


@pytest.mark.parametrize(("slip", "given", "remedy"), TRAINING_SLIPS.values(), ids=TRAINING_SLIPS)
def test_a_slip_in_training_is_answered_the_same_way(slip, given, remedy):
    with pytest.raises(klrl.InputError, match=f"(?s){given}.*{remedy}"):
        slip()


def test_what_is_typed_rightly_passes():
    """The checks refuse nothing that worked: rewards with defaults, partials, modules, builtins."""

    class Reward(torch.nn.Module):
        def forward(self, tokens, prompt=None):
            return tokens.sum(-1)

    def of_keywords(tokens, prompt=None, *, scale=2.0):
        return scale * tokens.sum(-1)

    for reward in (Reward(), of_keywords, lambda *both: both[0].sum(-1), klrl.scale(Reward(), 2.0)):
        assert klrl.posterior(ask(reward)).value > 0
    assert klrl.compare(klrl.enumerate_support(PRIOR), TARGET).reverse_kl > 0
    assert klrl.compare(PRIOR, (one for one in [TARGET, TARGET])).mean["reverse_kl"] > 0
    assert klrl.kl_values.k1(np.array([1, 2])).tolist() == [1, 2]

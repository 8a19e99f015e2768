"""Statements about sequences: chain rules, soft Bellman equations, paths, shaping, two words.

KL(π‖q) = Σ_t E_π KL(π(·|y_<t)‖q(·|y_<t)),    V(s) = λ log Σ_a q(a|s) e^{(r(s,a) + V(sa))/λ}     (1)
"""

import math

import torch
from torch import Tensor

from klrl_edu.core import logspace
from klrl_edu.core.spaces import SequenceSpace
from klrl_edu.exact.posterior import posterior
from klrl_edu.exact.soft_bellman import SoftValues, soft_bellman
from klrl_edu.models.contract import conditional_log_probs, sequence_log_probs
from klrl_edu.models.ngram import NGramModel
from klrl_edu.problems.automata import accept_reward, at_least
from klrl_edu.problems.problem import Problem
from klrl_edu.theory.cases import Case
from klrl_edu.theory.statements import Sides, bound, identity

kl, mean = logspace.kl_divergence, logspace.expectation


def stepwise(case: Case, weights: Tensor) -> Tensor:
    """The sum of the tokens' divergences, Σ_t KL(π(·|y_<t)‖q(·|y_<t)), over the support's
    sequences, averaged with log-weights [K].
    """
    mine, prior = (
        conditional_log_probs(model, case.support.tokens).detach()
        for model in (case.policy, case.problem.prior)
    )
    live = case.problem.space.live(case.support.tokens)
    return mean(weights, torch.where(live, kl(mine, prior), 0.0).sum(-1))


@identity(
    r"\mathrm{KL}(\pi\|q) = \sum_t"
    r" E_{\pi}\,\mathrm{KL}\big(\pi(\cdot|y_{<t})\,\|\,q(\cdot|y_{<t})\big)",
    "Cover & Thomas (2006), th. 2.5.3",
    "t01",
)
def chain_rule(case: Case) -> Sides:
    """A sequence's divergence is the sum of its tokens', with prefixes averaged under the
    policy.
    """
    return stepwise(case, case.log_policy), kl(case.log_policy, case.log_prior)


chain_rule.broken(
    "prefixes averaged under the prior",
    lambda case: (stepwise(case, case.log_prior), kl(case.log_policy, case.log_prior)),
)


@identity(
    r"H(\pi) = \sum_t E_{\pi} H\big(\pi(\cdot|y_{<t})\big)",
    "Cover & Thomas (2006), th. 2.5.1",
    "t01",
)
def entropy_chain_rule(case: Case) -> Sides:
    """A sequence's entropy is the sum of its tokens', with prefixes averaged under the policy."""
    return _stepwise_entropy(case, case.log_policy), logspace.entropy(case.log_policy)


def _stepwise_entropy(case: Case, weights: Tensor) -> Tensor:
    steps = logspace.entropy(conditional_log_probs(case.policy, case.support.tokens).detach())
    return mean(
        weights, torch.where(case.problem.space.live(case.support.tokens), steps, 0.0).sum(-1)
    )


entropy_chain_rule.broken(
    "sequences weighed alike",
    lambda case: (
        _stepwise_entropy(case, torch.log_softmax(0 * case.log_policy, 0)),
        logspace.entropy(case.log_policy),
    ),
)


def soft_values(case: Case) -> SoftValues:
    """The soft values V and Q of every prefix."""
    return soft_bellman(case.support, case.kl_coef)


@identity(r"V(\varnothing) = \lambda\log Z", "Levine (2018), §2", "t04")
def bellman_root(case: Case) -> Sides:
    """Backward induction ends at the evidence that the sum over sequences gives."""
    return soft_values(case).state_values[0], case.tilted.value


bellman_root.broken(
    "the mean, not the soft maximum, over tokens",
    lambda case: (mean(case.log_prior, case.rewards), case.tilted.value),
)


def edge_sums(case: Case, values: Tensor) -> Tensor:
    """The sum over each sequence's edges [K] of one value an edge [E]."""
    edge = case.support.trie.edge_of
    # −1 stands where a sequence has ended: it reads some edge, and counts 0
    return torch.where(edge >= 0, values[edge.clamp(min=0)], 0.0).sum(-1)


@identity(
    r"\prod_t q(y_t|y_{<t})\,e^{(Q(y_{<t},y_t)-V(y_{<t}))/\lambda} = \pi^*(y)",
    "Levine (2018), §2",
    "t04",
)
def bellman_policy(case: Case) -> Sides:
    """The soft Bellman policy, token by token, is the posterior over sequences."""
    return edge_sums(case, soft_values(case).log_policy), case.log_star


bellman_policy.broken(
    "tilted by the mean return ahead, not by the soft one",
    lambda case: (edge_sums(case, _greedy(case)), case.log_star),
)


def _greedy(case: Case) -> Tensor:
    """The policy log q(a|s) e^{E_q[r | s a]/λ}, normalised: each step looks ahead by the mean."""
    # at λ = inf the soft maximum is the mean
    values = soft_bellman(case.support, math.inf)
    trie = values.trie
    lifted = values.log_prior + values.action_values / case.kl_coef
    return lifted - logspace.segment_logsumexp(lifted, trie.parent, trie.nodes)[trie.parent]


@identity(
    r"-V(\varnothing) + \sum_t r_t - \lambda\sum_t \log\frac{\pi^*(y_t|y_{<t})}{q(y_t|y_{<t})} = 0",
    "Nachum et al. (2017)",
    "t05",
)
def path_consistency(case: Case) -> Sides:
    """On every path, on-policy or off, the soft values, rewards and log-ratios of the optimum
    balance.
    """
    values = soft_values(case)
    return (
        -values.state_values[0]
        + case.rewards
        - case.kl_coef * edge_sums(case, values.log_policy - values.log_prior),
        0 * case.rewards,
    )


def _path_of(case: Case, log_policy: Tensor) -> Sides:
    log_ratio = log_policy - case.log_prior
    return -case.tilted.value + case.rewards - case.kl_coef * log_ratio, 0 * case.rewards


path_consistency.broken(
    "a policy that is not the optimum", lambda case: _path_of(case, case.log_policy)
)


@identity(
    r"V(s) = \lambda\log E_q\big[e^{\sum_{t\ge|s|} r_t/\lambda}\,\big|\,s\big]",
    "Todorov (2006); eq. (1)",
    "t04",
)
def value_of_a_prefix(case: Case) -> Sides:
    """A prefix is worth the soft maximum of what may follow it."""
    values, trie = soft_values(case), case.support.trie
    return values.state_values, case.kl_coef * _log_mean_to_go(case, trie.node_of, trie.nodes)


def _log_mean_to_go(case: Case, node: Tensor, nodes: int) -> Tensor:
    """The evidence from each node on, log E_q[e^{reward to go/λ} | node] [nodes], as a sum over the
    sequences below each node.
    """
    rewards = case.support.token_rewards
    # a plain sum over the texts below each node, without any recursion
    to_go = rewards.flip(-1).cumsum(-1).flip(-1)  # from position t on [K,T]
    below = node >= 0
    # each text counts at every node along it
    weight = case.log_prior[:, None].expand_as(to_go)
    numerator = logspace.segment_logsumexp(
        (weight + to_go / case.kl_coef)[below], node[below], nodes
    )
    return numerator - logspace.segment_logsumexp(weight[below], node[below], nodes)


value_of_a_prefix.broken(
    "another λ on the right",
    lambda case: (
        soft_values(case).state_values,
        soft_bellman(case.support, case.kl_coef + 0.5).state_values,
    ),
)


@identity(
    r"\lambda\log\sum_y q(y)e^{r(y)/\lambda} = \lambda\log\,\mu^\top M_1 \cdots M_T \mathbf 1",
    "Rabiner (1989), §III.A",
    "t08",
)
def forward_backward(case: Case) -> Sides:
    """For an n-gram and an automaton's reward, products of matrices give the sum over all
    sequences, which are here counted one by one.
    """
    bigram, value, otherwise = _bigram(case)
    by_matrices = posterior(_two_as(bigram, value, otherwise, case.kl_coef), "forward_backward")
    return by_matrices.value, _one_by_one(bigram, value, otherwise, case.kl_coef)


def _bigram(case: Case) -> tuple[NGramModel, float, float]:
    """A random bigram over two letters, and what two 'a's and fewer earn."""
    space = SequenceSpace(("a", "b"), 3, eos=True)
    # from an untrained one, which knows how its logits lie
    shape = NGramModel(space, 2).logits.shape
    value, otherwise = case.normal(2).tolist()
    return NGramModel(space, 2, case.normal(*shape)), value, otherwise


def _two_as(prior: NGramModel, value: float, otherwise: float, kl_coef: float) -> Problem:
    return Problem(prior, accept_reward(at_least("a", 2, prior.space), value, otherwise), kl_coef)


def _one_by_one(prior: NGramModel, value: float, otherwise: float, kl_coef: float) -> Tensor:
    """λ log Σ q e^{r/λ} over all sequences, each read as a text."""
    tokens = prior.space.all_tokens()
    texts = prior.space.decode(tokens)
    # read as text, since the automaton is what is tried
    earned = [value if text.split().count("a") >= 2 else otherwise for text in texts]
    scaled = torch.tensor(earned, dtype=torch.float64) / kl_coef
    return kl_coef * torch.logsumexp(sequence_log_probs(prior, tokens).detach() + scaled, 0)


def _half_at_twice(case: Case) -> Sides:
    bigram, value, otherwise = _bigram(case)
    twice = posterior(_two_as(bigram, value, otherwise, 2 * case.kl_coef), "forward_backward")
    return twice.value / 2, _one_by_one(bigram, value, otherwise, case.kl_coef)


forward_backward.broken("half the value at twice λ", _half_at_twice)


@identity(
    r"r'(s,a) = r(s,a) + \Phi(sa) - \Phi(s) \;\Rightarrow\; \pi^*_{r'} = \pi^*_r,\; V'(\varnothing)"
    r" = V(\varnothing) - \Phi(\varnothing)",
    "Ng, Harada & Russell (1999), th. 1",
    "t05",
)
def potential_shaping(case: Case) -> Sides:
    """A potential over prefixes, 0 at the end, moves rewards along a sequence and leaves the
    posterior as it is.
    """
    return _shaped(case, ends_at_zero=True)


def _shaped(case: Case, *, ends_at_zero: bool) -> Sides:
    trie = case.support.trie
    potential = case.normal(trie.nodes)
    last = (
        torch.zeros(len(trie.key), dtype=torch.float64)
        if ends_at_zero
        else case.normal(len(trie.key))
    )
    # Φ(sa) − Φ(s) of every edge
    step = (
        torch.where(trie.child >= 0, potential[trie.child.clamp(min=0)], last)
        - potential[trie.parent]
    )
    edge = trie.edge_of
    shaped = case.support.token_rewards + torch.where(edge >= 0, step[edge.clamp(min=0)], 0.0)
    values = soft_bellman(
        type(case.support)(case.support.tokens, case.log_prior, shaped, trie), case.kl_coef
    )
    left = torch.cat([edge_sums(case, values.log_policy), values.state_values[:1]])
    return left, torch.cat([case.log_star, case.tilted.value[None] - potential[0]])


potential_shaping.broken(
    "a potential that is not 0 at the end", lambda case: _shaped(case, ends_at_zero=False)
)


@bound(
    r"\mathrm{KL}(\pi_1\|q_1) \le \mathrm{KL}(\pi\|q)",
    "data processing; Cover & Thomas (2006), th. 2.5.3",
    "t01",
)
def data_processing(case: Case) -> Sides:
    """Looking at the first token alone, two models are no easier to tell apart."""
    return kl(_first_token(case, case.log_policy), _first_token(case, case.log_prior)), kl(
        case.log_policy, case.log_prior
    )


def _first_token(case: Case, log_probs: Tensor) -> Tensor:
    return logspace.segment_logsumexp(
        log_probs, case.support.tokens[:, 0], case.problem.space.vocab_size
    )


data_processing.broken(
    "the sides exchanged",
    lambda case: (
        kl(case.log_policy, case.log_prior),
        kl(_first_token(case, case.log_policy), _first_token(case, case.log_prior)),
    ),
)


def _two_words(case: Case) -> Tensor:
    """A joint law [3,4] of two words."""
    return case.distribution(12).reshape(3, 4)


def _marginals(joint: Tensor) -> tuple[Tensor, Tensor]:
    return torch.logsumexp(joint, 1), torch.logsumexp(joint, 0)


@identity(
    r"E_q\big[\log q(y_1|y_2) + \log q(y_2|y_1)\big] = -H(q) + I(Y_1;Y_2)",
    "Besag (1975) for the pseudo-likelihood",
    "t10",
)
def pseudo_log_likelihood(case: Case) -> Sides:
    """On two words, what a masked model maximises is −H(q) + I: it counts the mutual information
    once too often.
    """
    joint = _two_words(case)
    first, second = _marginals(joint)
    likelihood = (joint.exp() * ((joint - second) + (joint - first[:, None]))).sum()
    return likelihood, -logspace.entropy(joint.flatten()) + kl(
        joint.flatten(), (first[:, None] + second).flatten()
    )


def _without_information(case: Case) -> Sides:
    joint = _two_words(case)
    first, second = _marginals(joint)
    return (joint.exp() * ((joint - second) + (joint - first[:, None]))).sum(), -logspace.entropy(
        joint.flatten()
    )


pseudo_log_likelihood.broken("the mutual information left out", _without_information)


@identity(r"I(Y_1;Y_2) = H(Y_1) + H(Y_2) - H(Y_1,Y_2)", "Cover & Thomas (2006), th. 2.4.1", "t01")
def mutual_information(case: Case) -> Sides:
    """Mutual information is the divergence of a joint law from the product of its margins."""
    joint = _two_words(case)
    first, second = _marginals(joint)
    entropies = (
        logspace.entropy(first) + logspace.entropy(second) - logspace.entropy(joint.flatten())
    )
    return kl(joint.flatten(), (first[:, None] + second).flatten()), entropies


def _product_first(case: Case) -> Sides:
    joint = _two_words(case)
    first, second = _marginals(joint)
    return (
        kl((first[:, None] + second).flatten(), joint.flatten()),
        mutual_information.sides(case)[1],
    )


mutual_information.broken("the product first", _product_first)

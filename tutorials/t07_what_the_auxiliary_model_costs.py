# ---
# jupyter:
#   jupytext:
#     formats: py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 7. What does the auxiliary model cost?
#
# Everything so far needed $q(y)$, the prior's probability of a sentence. But suppose that $q$ is the language itself: one can *listen* to it, sentence by
# sentence, and nobody knows its probabilities. The article that the four sentences come from,
# 《大语言模型原理基础与前沿 带有KL惩罚的强化学习：贝叶斯推理观点》 ([article C](theory.md#what-five-articles-claim)),
# then puts an *auxiliary model* $p$ in the place of $q$, and says that this is importance
# sampling, and unbiased. We ask what importance sampling is, what was done instead, and **what the auxiliary model costs in the end, in reward**.

# %%
import itertools
import math

import torch

from klrl_edu import (
    NGramModel,
    Problem,
    RecurrentModel,
    SequenceTable,
    acceptance,
    audit_gradient,
    compare,
    evidence,
    four_sentences,
    kl_gradients,
    losses,
    plots,
    posterior,
    restrict_to_support,
    seeded_draw,
    table_reward,
    token_log_probs,
    train,
)
from klrl_edu.core.display import text_table
from klrl_edu.exercises import check
from klrl_edu.exercises.t07 import AUXILIARY
from klrl_edu.learning.training import cosine
from klrl_edu.problems.examples import (
    FOUR_POLICY,
    FOUR_REWARDS,
    FOUR_SENTENCES,
    four_sentences_policy,
)
from klrl_edu.reference import expectation, gradient, kl, mean_and_variance, objective
from klrl_edu.reference import posterior as posterior_of

q, p, r, pi = FOUR_SENTENCES, AUXILIARY, FOUR_REWARDS, FOUR_POLICY
lam = 1.0  # λ, in reward units per nat

# %% [markdown]
# ## Importance sampling: the means of q from the samples of p
#
# Draw from $p$, and give each draw the weight $w = q/p$, which says how much more often $q$ would have drawn it:
#
# $$\mathrm{E}_q[f] = \sum_y p(y)\,\frac{q(y)}{p(y)}\,f(y) = \mathrm{E}_p[w\,f], \qquad w = \frac{q}{p}.$$
#
# Nothing is approximated: weighted draws are unbiased for *any* $p$, however bad. One condition was used: $p > 0$ wherever $q f \ne 0$.

# %%
w = {y: q[y] / p[y] for y in q}
print(
    text_table(
        ["sentence", "q", "p", "weight q/p", "reward r", "p·w·r"],
        [[y, q[y], p[y], w[y], r[y], p[y] * w[y] * r[y]] for y in q],
    )
)
right = expectation(q, lambda y: r[y])
print(
    f"\nE_q[r] = {right:.12f}, E_p[w·r] = {expectation(p, lambda y: w[y] * r[y]):.12f};"
    f" without weights E_p[r] = {expectation(p, lambda y: r[y]):.12f}"
)
hole = {y: p[y] / (1 - p["a dog"]) if y != "a dog" else 0.0 for y in p}
missed = expectation(hole, lambda y: q[y] / hole[y] * r[y])
print(
    f"a p that never says 'a dog': E_p[w·r] = {missed:.12f}, for ever, with any number"
    " of draws"
)
assert abs(expectation(p, lambda y: w[y] * r[y]) - right) < 1e-9

# %% [markdown]
# What a bad $p$ costs is *variance*: a few draws carry most of the weight. The **effective sample size** says how many draws of $q$ itself $n$ weighted
# draws of $p$ are worth, by the spread of the weights alone: $\mathrm{ESS}/n = 1/\mathrm{E}_p[w^2]$, which is 1 only for $p = q$.

# %%
ess = 1 / expectation(p, lambda y: w[y] ** 2)
print(f"ESS/n = {ess:.12f}: a hundred draws of p are worth {100 * ess:.0f} of q")
auxiliary = SequenceTable.from_texts(p, space=four_sentences().space)
to_prior = compare(
    auxiliary, posterior(four_sentences(kl_coef=math.inf))
)  # at λ = ∞ the posterior is the prior
assert abs(to_prior.effective_sample_size - ess) < 1e-9

# %% [markdown]
# ### Exercise 1: what one draw is worth
#
# Compute the variance of one weighted draw, $w(y)\,r(y)$ with $y \sim p$.

# %% tags=["exercise"]
answer = ...
check("t07.variance", answer)

# %% tags=["solution", "hide-cell"]
answer = (
    expectation(p, lambda y: (w[y] * r[y]) ** 2)
    - expectation(p, lambda y: w[y] * r[y]) ** 2
)
check("t07.variance", answer)
direct = mean_and_variance(q, lambda y: r[y])[1]
print(
    f"variance of a draw: {answer:.6f} weighted, {direct:.6f} from q itself; for this"
    f" mean a hundred draws are worth {100 * direct / answer:.0f}"
)
# ESS is a rule of thumb: it knows the weights and not f. Here it is too kind.

# %% [markdown]
# ## Without the normaliser: a bias that falls as 1/n
#
# Often $q$ is known up to a factor only; $\pi^* \propto q\,e^{r/\lambda}$ is so before anyone has computed $Z$. Then the weights are divided by their sum,
#
# $$\hat f = \frac{\sum_i w_i f_i}{\sum_i w_i}, \qquad y_1, \dots, y_n \sim p,$$
#
# and the factor cancels. This is *self-normalised* importance sampling. A ratio of two means is not the mean of the ratios, so it is biased, and we can
# say by how much: we go through every list of $n$ draws. At $n = 1$ the weight cancels altogether, and what is left is $\mathrm{E}_p[f]$.

# %%
rewards = torch.tensor([r[y] for y in q], dtype=torch.float64)
log_q, log_p = (
    torch.tensor([math.log(x[y]) for y in q], dtype=torch.float64) for x in (q, p)
)
for n in (1, 2, 4):
    lists = torch.tensor(
        list(itertools.product(range(4), repeat=n))
    )  # every list of n draws
    probability = log_p[lists].sum(-1).exp()
    bias = (
        float(
            probability
            @ evidence.self_normalised(rewards[lists], (log_q - log_p)[lists])
        )
        - right
    )
    print(f"n = {n}: {len(lists):3} lists, bias {bias:+.12f}, n·bias {n * bias:+.6f}")
    assert (
        abs(
            bias
            + right
            - acceptance.importance_sampling_mean(log_p, log_q - log_p, 1.0, rewards, n)
        )
        < 1e-9
    )
first_order = -expectation(p, lambda y: w[y] ** 2 * (r[y] - right))
print(f"the limit of n·bias, −E_p[w²(f − E_q f)] = {first_order:+.6f}")

# %% [markdown]
# The spread of the mean falls as $1/\sqrt n$, its bias as $1/n$: with many draws the bias is the smaller trouble.
#
# ### Exercise 2: every pair
#
# Write `pair_mean(p, q, f)` for dictionaries: the exact mean of $\hat f$ at $n = 2$, over all pairs. It is tried on random tables.


# %% tags=["exercise"]
answer = ...  # def pair_mean(p, q, f): ..., and then answer = pair_mean
check("t07.pair", answer)


# %% tags=["solution", "hide-cell"]
def pair_mean(p, q, f):
    w = {y: q[y] / p[y] for y in p}
    return sum(
        p[x] * p[y] * (w[x] * f[x] + w[y] * f[y]) / (w[x] + w[y]) for x in p for y in p
    )


answer = pair_mean
check("t07.pair", answer)
print(
    f"at n = 2: {pair_mean(p, q, r):.6f}; {expectation(p, lambda y: r[y]):.6f} under p"
    f" and {right:.6f} under q"
)

# %% [markdown]
# One thing must be said before we go on. **The weights contain $q$.** Importance sampling helps where one can *evaluate* $q$ and not sample from it. Our
# learner is in the opposite place.
#
# ## What article C does
#
# With $s = \nabla \log \pi$ the gradient of the penalty is $\nabla \mathrm{KL}(\pi\|q) = \mathrm{E}_\pi[s \log \pi/q]$. Article C estimates it by
#
# $$\mathrm{E}_\pi\!\left[s \left(\log\frac{\pi}{p} + c\right)\right].$$
#
# Look for importance sampling in it: the draws come from $\pi$, no draw has a weight, and $p$ only stands where $q$ stood, *inside the logarithm*. What was
# changed is not where samples come from but what is asked of them. And the constant? $\mathrm{E}_\pi[s] = 0$, so it does nothing to the mean. The bias is exact:
#
# $$\mathrm{E}_\pi\!\left[s \left(\log\frac{\pi}{p} + c\right)\right] - \nabla\mathrm{KL}(\pi\|q)
# = \mathrm{E}_\pi\!\left[s \log\frac{q}{p}\right] = \nabla\,[\mathrm{KL}(\pi\|p) - \mathrm{KL}(\pi\|q)].$$
#
# It is 0 for every $\pi$ only if $\log q/p$ is the same for all sentences, that is if $p = q$. In sequence logits:

# %%
right_gradient = gradient(pi, lambda y: math.log(pi[y] / q[y]))
followed = gradient(pi, lambda y: math.log(pi[y] / p[y]))
bias = gradient(pi, lambda y: math.log(q[y] / p[y]))
print(
    text_table(
        ["sentence", "∇KL(π‖q)", "what is followed", "bias"],
        [[y, right_gradient[y], followed[y], bias[y]] for y in q],
        digits=6,
    )
)
error = kl(pi, p) - kl(pi, q)
print(
    f"\nKL(π‖p) = {kl(pi, p):.12f} where KL(π‖q) = {kl(pi, q):.12f}: an error of"
    f" {error:+.12f} nats, E_π[log q/p] exactly"
)
assert abs(error - expectation(pi, lambda y: math.log(q[y] / p[y]))) < 1e-9
assert all(abs(followed[y] - right_gradient[y] - bias[y]) < 1e-9 for y in q)

# %% [markdown]
# The audit sees the same without our algebra: it runs an estimator on every sample that can be drawn. Beside article C's, with and without a constant, stands
# importance sampling in earnest, `off_policy_sequence`: drawn from $p$, weighted by $\pi/p$, and with $q$ in the logarithm.

# %%
policy, problem = four_sentences_policy(), four_sentences(kl_coef=lam)


def article(c):
    def substituted(batch):  # log π/p + c in the place of log π/q
        with_p = token_log_probs(auxiliary, batch.tokens)
        return (
            kl_gradients.reward_k1(batch.log_probs, with_p)
            + c * batch.log_probs.sum(-1).mean()
        )

    return substituted


reports = {
    "π, log π/q": audit_gradient(kl_gradients.reward_k1, policy, problem),
    "π, log π/p": audit_gradient(article(0.0), policy, problem),
    "π, log π/p + 1": audit_gradient(article(1.0), policy, problem),
    "p, (π/p) log π/q": audit_gradient(
        kl_gradients.off_policy_sequence, policy, problem, behaviour=auxiliary
    ),
}
rows = [
    [
        name,
        *report.mean.tolist(),
        round(100 * report.relative_bias["reverse_kl"], 1),
        report.variance,
    ]
    for name, report in reports.items()
]
print(text_table(["draws, weight of s", *q, "bias in %", "variance"], rows, digits=4))

# %% [markdown]
# ### Exercise 3: what the constant is good for
#
# It leaves the mean and changes the variance. Which $c$ makes the variance of $s\,(\log \pi/p + c)$ smallest, for our $\pi$ and $p$? (In sequence logits
# $\|s(y)\|^2 = 1 - 2\pi(y) + \sum_z \pi(z)^2$.)

# %% tags=["exercise"]
answer = ...
check("t07.constant", answer)

# %% tags=["solution", "hide-cell"]
squares = sum(x * x for x in pi.values())
size = {y: 1 - 2 * pi[y] + squares for y in pi}  # ‖s‖²
answer = -expectation(pi, lambda y: size[y] * math.log(pi[y] / p[y])) / expectation(
    pi, lambda y: size[y]
)
check("t07.constant", answer)
best = audit_gradient(article(answer), policy, problem)
others = ", ".join(
    f"{reports[name].variance:.6f} at c = {c}"
    for c, name in enumerate(("π, log π/p", "π, log π/p + 1"))
)
print(f"c = {answer:.6f}: variance {best.variance:.6f}; {others}")
print(
    f"the bias: {100 * best.relative_bias['reverse_kl']:.4f} % with it,"
    f" {100 * reports['π, log π/p'].relative_bias['reverse_kl']:.4f} % without"
)
# A baseline under another name. At its best it quietens the estimate of the wrong thing, and the 1 that differentiating π log π leaves behind is loud.

# %% [markdown]
# ## Where the whole chain ends
#
# A biased gradient could still lead to the right place. This one is the exact gradient of another aim, $\mathrm{E}_\pi[r] - \lambda\,\mathrm{KL}(\pi\|p)$, so by
# tutorial 3 training ends at **the posterior of the wrong prior**, $\pi^*_p \propto p\,e^{r/\lambda}$. What does that cost? By the same identity, what $\pi^*_p$ lacks under
# the true aim is its *regret*
#
# $$\lambda \log Z - J(\pi^*_p) = \lambda\,\mathrm{KL}(\pi^*_p\,\|\,\pi^*_q).$$

# %%
star, log_z = posterior_of(q, r, lam)
misled, misled_log_z = posterior_of(p, r, lam)
print(
    text_table(
        ["sentence", "q", "p", "π* of q", "π* of p"],
        [[y, q[y], p[y], star[y], misled[y]] for y in q],
        digits=6,
    )
)
regret = lam * kl(misled, star)
print(
    f"\nregret = λ KL(π*_p‖π*_q) = {regret:.12f}, λ log Z − J(π*_p) ="
    f" {lam * log_z - objective(misled, q, r, lam):.12f}"
)
print(
    f"the learner believes in λ log Z_p = {lam * misled_log_z:.6f}, gets J(π*_p) ="
    f" {objective(misled, q, r, lam):.6f}, and could have had {lam * log_z:.6f}"
)
assert abs(regret - lam * log_z + objective(misled, q, r, lam)) < 1e-9

# %% [markdown]
# More samples do not help, nor does more training: they lead to $\pi^*_p$ more surely.
#
# ### Exercise 4: the regret
#
# Write `regret_of(p, q, r, lam)` for dictionaries, in reward units. It is tried on random tables. Before you run it: does a smaller $\lambda$ make a wrong prior
# dearer or cheaper?


# %% tags=["exercise"]
answer = ...  # def regret_of(p, q, r, lam): ..., and then answer = regret_of
check("t07.regret", answer)


# %% tags=["solution", "hide-cell"]
def regret_of(p, q, r, lam):
    return lam * kl(posterior_of(p, r, lam)[0], posterior_of(q, r, lam)[0])


answer = regret_of
check("t07.regret", answer)
for each in (0.1, 0.3, 1.0, 3.0, 10.0):
    print(
        f"λ = {each:4g}: regret {regret_of(p, q, r, each):.6f}; of the priors alone, λ"
        f" KL(p‖q) = {each * kl(p, q):.6f}"
    )
# The firmer the leash, the more it matters where it is tied.

# %% [markdown]
# ## The first repair: q can be evaluated after all
#
# Say that the trainer's reference model is $p$ and cannot be changed, but $q(y)$ can be computed for a finished sentence. The reward is then free to carry
# what the prior lacks: some $r'$ makes the posterior of $p$ under $r'$ that of $q$ under $r$.
#
# ### Exercise 5: the corrected reward
#
# Write `corrected(p, q, r, lam)`: the reward $r'$, as a dictionary, with $p\,e^{r'/\lambda} = q\,e^{r/\lambda}$. It is tried on random tables.


# %% tags=["exercise"]
answer = ...  # def corrected(p, q, r, lam): ..., and then answer = corrected
check("t07.repair", answer)


# %% tags=["solution", "hide-cell"]
def corrected(p, q, r, lam):
    return {y: r[y] + lam * math.log(q[y] / p[y]) for y in p}


answer = corrected
check("t07.repair", answer)
print(", ".join(f"r'({y}) = {x:.6f}" for y, x in corrected(p, q, r, lam).items()))

# %% [markdown]
# $\lambda \log q/p$ is article C's bias, taken out by hand. With it the posterior is the right one, and so is $Z$:

# %%
fixed_reward = {y: r[y] + lam * math.log(q[y] / p[y]) for y in q}
fixed, fixed_log_z = posterior_of(p, fixed_reward, lam)
print(
    "largest |π* of (p, r') − π* of (q, r)|:"
    f" {max(abs(fixed[y] - star[y]) for y in q):.0e}; |difference of log Z|:"
    f" {abs(fixed_log_z - log_z):.0e}"
)
assert max(abs(fixed[y] - star[y]) for y in q) < 1e-9

# %% [markdown]
# ## An experiment: an LSTM that trusts p
#
# The LSTM of tutorial 3 again, twice. Both see $p$ as their prior; the second one gets the corrected reward. We hold both against the posterior of $q$, and the
# first against that of $p$ as well. Neither has seen either.

# %%
space = problem.space
trusting = Problem(auxiliary, table_reward(r, space), lam)
repaired = Problem(auxiliary, table_reward(fixed_reward, space), lam)
target, believed = posterior(problem), posterior(trusting)
options = {"steps": 10, "batch_size": 64, "max_grad_norm": 1.0}
lines = {
    "trained with p, to π* of q": ([], []),
    "trained with p, to π* of p": ([], []),
    "reward corrected, to π* of q": ([], []),
}
for tilted, measured in (
    (
        trusting,
        {"trained with p, to π* of q": target, "trained with p, to π* of p": believed},
    ),
    (repaired, {"reward corrected, to π* of q": target}),
):
    network = restrict_to_support(
        RecurrentModel(space, hidden_size=32, seed=0), auxiliary
    )
    draw = seeded_draw(0)
    for block in range(21):  # 20 × 10 steps, so that we can look in between
        if block:
            train(
                network,
                tilted,
                losses.rloo,
                lr=1e-2 * cosine((block - 1) / 20),
                draw=draw,
                **options,
            )
        for name, one in measured.items():
            lines[name][0].append(10 * block)
            lines[name][1].append(compare(network, one).reverse_kl)
print(
    text_table(
        ["run, and distance", "KL before", "KL after 200 steps"],
        [[name, y[0], y[-1]] for name, (_, y) in lines.items()],
        digits=6,
    )
)
print(f"the regret found above, over λ: {regret / lam:.6f}")
assert abs(lines["trained with p, to π* of q"][1][-1] - regret / lam) < 1e-3

# %% [markdown]
# The trusting network optimises the wrong thing, and does it well: its distance from the posterior of $p$ goes on falling, that from the posterior of $q$
# stops at the regret.
#
# ## The second repair: wait for the sentence
#
# The corrected reward holds $q$, and so did the weights. Is anything unbiased left to a learner who can only listen? There is, if it is patient. Take a
# sentence $y$ of the policy, and listen to $q$ until it says $y$ itself, at the $K$-th sentence. Then
#
# $$\mathrm{E}\!\left[-\sum_{k=1}^{K-1} \frac1k\right] = -\sum_{k \ge 1} \frac{\mathrm{P}(K > k)}{k} = -\sum_{k \ge 1} \frac{(1 - q(y))^k}{k} = \log q(y),$$
#
# a logarithm out of counting (van Opheusden, Acerbi and Ma, 2020). Put in the place of $\log q(y)$ it makes $\mathrm{E}_\pi[s \log \pi/q]$ right, without any $p$.

# %%
rows = []
for y in q:
    chance = [
        q[y] * (1 - q[y]) ** (k - 1) for k in range(1, 1001)
    ]  # P(K = k); what comes later is below 1e-40
    estimate = [0.0, *(-x for x in itertools.accumulate(1 / k for k in range(1, 1000)))]
    mean = sum(a * b for a, b in zip(chance, estimate, strict=True))
    variance = sum(a * (b - mean) ** 2 for a, b in zip(chance, estimate, strict=True))
    rows.append(
        [y, math.log(q[y]), mean, variance, sum(k * a for k, a in enumerate(chance, 1))]
    )
    assert abs(mean - math.log(q[y])) < 1e-9
print(
    text_table(
        [
            "sentence",
            "log q",
            "mean of the estimate",
            "variance",
            "sentences to wait, 1/q",
        ],
        rows,
        digits=9,
    )
)
print(
    f"\nto wait for a sentence of π: {expectation(pi, lambda y: 1 / q[y]):.4f}"
    " sentences of q, on average"
)

# %% [markdown]
# For four sentences that is cheap. Among all the sentences of a language, $1/q(y)$ of them take longer than anyone lives.
#
# ## The third repair: listen longer, to fit a better p
#
# Then we are back at an auxiliary model, and the question is how good it must be. We fit a bigram to $n$ sentences of $q$, and a unigram, which takes the two words for independent (both on
# the four sentences that there are). For each $n$ we draw a hundred corpora, and each of them has an exact KL error and an exact regret.
#
# What should we expect? To second order the regret is half of $\lambda$ times the variance of $\log p/q$ under $\pi^*$, and counts give
#
# $$\mathrm{E}[\text{regret}] \approx \frac{\lambda}{2n} \sum_y \frac{\pi^*(y)\,(1 - \pi^*(y))}{q(y)}, \qquad
# \mathrm{E}\big[(\mathrm{KL}(\pi\|p) - \mathrm{KL}(\pi\|q))^2\big] \approx \frac{1}{n}\left(\sum_y \frac{\pi(y)^2}{q(y)} - 1\right).$$
#
# The sentence that costs most is the one that the posterior wants and the corpus seldom says.

# %%
sentences, corpora, sizes = list(q), 100, (10, 30, 100, 300, 1000, 3000)
draw = seeded_draw(0)


def fitted(counts, order):
    """An n-gram of the heard sentences, on the four."""
    heard = {y: n for y, n in zip(sentences, counts, strict=True) if n}
    with torch.no_grad():
        mass = (
            NGramModel.fit(space, list(heard), order, weights=list(heard.values()))
            .log_prob(space.encode(sentences))
            .exp()
        )
    return dict(zip(sentences, (mass / mass.sum()).tolist(), strict=True))


costs, errors = {1: [], 2: []}, {1: [], 2: []}
for n in sizes:
    heard = draw(log_q[None], torch.zeros(corpora * n, dtype=torch.long)).view(
        corpora, n
    )
    counts = [torch.bincount(row, minlength=4).tolist() for row in heard]
    for order in (1, 2):
        models = [fitted(row, order) for row in counts]
        costs[order].append(
            sum(lam * kl(posterior_of(one, r, lam)[0], star) for one in models)
            / corpora
        )
        errors[order].append(
            math.sqrt(sum((kl(pi, one) - kl(pi, q)) ** 2 for one in models) / corpora)
        )
price = lam / 2 * sum(star[y] * (1 - star[y]) / q[y] for y in q)
spread = math.sqrt(expectation(pi, lambda y: pi[y] / q[y]) - 1)
rows = [
    [
        n,
        costs[1][i],
        costs[2][i],
        price / n,
        errors[1][i],
        errors[2][i],
        spread / math.sqrt(n),
    ]
    for i, n in enumerate(sizes)
]
header = [
    "sentences",
    "regret, unigram",
    "bigram",
    "expected",
    "KL error, unigram",
    "bigram",
    "expected",
]
print(text_table(header, rows, digits=3))
first, second = (
    {
        word: sum(q[y] for y in q if y.split()[t] == word)
        for word in ("the", "a", "cat", "dog")
    }
    for t in (0, 1)
)
independent = {y: first[y.split()[0]] * second[y.split()[1]] for y in q}
floor = lam * kl(posterior_of(independent, r, lam)[0], star)
print(
    f"\nwhat no corpus takes from the unigram: regret {floor:.6f}, KL error"
    f" {kl(pi, independent) - kl(pi, q):+.6f}"
)
assert costs[1][0] < costs[2][0]
assert costs[2][-1] < floor / 3
assert abs(costs[1][-1] / floor - 1) < 0.2

# %% [markdown]
# Two rates and a floor. The error of the *KL* falls as $1/\sqrt n$, the *regret* as $1/n$: near the optimum $J$ is flat, and small mistakes about $q$
# cost less than they show. The unigram is the better model while sentences are few, and then it stops: it cannot say that words depend on each other.

# %% mystnb={"image": {"alt": "Left: the self-normalised bias falls as 1/n. Middle: the LSTM trained with p stops at the regret, the one with the corrected reward goes on. Right: the bigram's regret falls with the corpus, the unigram's reaches a floor."}}
with plots.publication_style():
    figure, (fading, astray, longer) = plots.new_figure(3, 3.5, 3.0)
    draws = [1, 2, 4, 8, 16, 32]
    biases = [
        right
        - acceptance.importance_sampling_mean(log_p, log_q - log_p, 1.0, rewards, n)
        for n in draws
    ]
    spreads = [
        math.sqrt(expectation(p, lambda y: (w[y] * (r[y] - right)) ** 2) / n)
        for n in draws
    ]
    shown = {"bias, exact": (draws, biases), "spread, first order": (draws, spreads)}
    plots.plot_lines(
        shown,
        fading,
        xlabel="draws n from p",
        ylabel="error of the mean of r",
        log=True,
    )
    fading.axhline(
        biases[0],
        color=plots.BLACK,
        linestyle="--",
        linewidth=1,
        label="bias without weights",
    )
    fading.set_xscale("log", base=2)
    fading.set_xticks(draws, draws)
    fading.legend()
    fading.set_title("Weights: a bias that fades")
    plots.plot_lines(
        lines, astray, xlabel="training step", ylabel="KL in nats", log=True
    )
    astray.axhline(
        regret / lam, color=plots.BLACK, linestyle="--", linewidth=1, label="regret/λ"
    )
    astray.legend()
    astray.set_title("Substitution: one that stays")
    shown = {
        "unigram": (sizes, costs[1]),
        "bigram": (sizes, costs[2]),
        "expected of counts": (sizes, [price / n for n in sizes]),
    }
    plots.plot_lines(
        shown,
        longer,
        xlabel="sentences heard",
        ylabel="mean regret in reward units",
        log=True,
    )
    longer.axhline(
        floor,
        color=plots.BLACK,
        linestyle="--",
        linewidth=1,
        label="the unigram's floor",
    )
    longer.set_xscale("log")
    longer.legend()
    longer.set_title("A better p is paid in sentences")
plots.picture(figure, "runs/tutorials/t07")

# %% [markdown]
# ## What to remember
#
# - Importance sampling changes where samples come from and repairs it by weights $q/p$: unbiased, at the price of variance; self-normalised, with a bias that
#   falls as $1/n$. It needs $q$.
# - Writing $p$ for $q$ inside the logarithm changes the *aim*: the bias is $\mathrm{E}_\pi[\nabla\log\pi\,\log q/p]$, no constant and no sample takes it away, and training ends
#   at the posterior of $p$. The regret is $\lambda\,\mathrm{KL}(\pi^*_p\|\pi^*_q)$.
# - Where $q$ can be evaluated, $r + \lambda\log q/p$ repairs everything. Where it can only be heard, wait for each sentence if you can, or listen longer, with
#   a model that is able to become $q$: the regret falls as $1/n$.

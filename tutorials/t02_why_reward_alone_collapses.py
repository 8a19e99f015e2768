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
# # 2. Why does reward alone collapse?
#
# Give a language model a reward for good texts, and train it to collect as much as it can. It gets better, and then it says
# one thing only. This tutorial asks **why reward alone collapses**, and finds an exact answer: training on reward is a walk along a
# path of Bayesian posteriors, and the path ends in a single sentence. (Tutorial 1 says what KL measures.)

# %%
import math

from klrl_edu import (
    RecurrentModel,
    compare,
    four_sentences,
    losses,
    plots,
    posterior,
    restrict_to_support,
    seeded_draw,
    train,
)
from klrl_edu.core.display import text_table
from klrl_edu.exercises import check
from klrl_edu.exercises.t02 import TIED_REWARDS
from klrl_edu.learning.training import cosine
from klrl_edu.problems.examples import FOUR_POLICY, FOUR_REWARDS, FOUR_SENTENCES
from klrl_edu.reference import entropy, expectation, kl
from klrl_edu.reference import posterior as exact_posterior

q, r = FOUR_SENTENCES, FOUR_REWARDS
print(text_table(["sentence", "prior q", "reward r"], [[y, q[y], r[y]] for y in q]))


# %%
def mean_reward(p):
    """E_p[r], in reward units."""
    return expectation(p, lambda y: r[y])


print(f"E_q[r] = {mean_reward(q):.4f}, max r = {max(r.values()):.4f}")

# %% [markdown]
# ## The optimum is one sentence
#
# Without anything else to consider, the aim is
#
# $$\max_\pi \; \mathrm{E}_\pi[r] = \max_\pi \sum_y \pi(y)\,r(y).$$
#
# A weighted mean is never above its largest value, and it reaches it only if all weight lies there: on 'a dog', the sentence that $q$
# likes least. So the collapse is not a failure of training. It is what we asked for. But *how* do we get there, and what lies on the way?
#
# ## A step that stays a distribution
#
# An article on KL penalties and Bayesian inference, signed 禅与计算机程序设计艺术 ([article A](theory.md#what-five-articles-claim)),
# improves a policy by adding to it, $\pi \leftarrow \pi + 0.1\,(r - \bar r)$. The sum stays 1 if $\bar r$
# is the plain mean of the rewards. What of the single probabilities?

# %%
added = dict(FOUR_POLICY)
mean = sum(r.values()) / len(r)
for k in range(1, 8):
    added = {y: added[y] + 0.1 * (r[y] - mean) for y in added}
    if k in (1, 2, 7):
        print(
            f"after {k} step{'s' * (k > 1)}: "
            + ", ".join(f"{y} {p:+.3f}" for y, p in added.items())
            + f"   (sum {sum(added.values()):.3f})"
        )

# %% [markdown]
# Negative after two steps, above one after seven. Probabilities should be *multiplied*:
#
# $$\pi_{k+1}(y) = \frac{\pi_k(y)\,e^{\eta\, r(y)}}{\sum_{y'} \pi_k(y')\,e^{\eta\, r(y')}}$$
#
# Each step favours good sentences by a factor, and divides by the sum. This is *mirror descent*; for a table with one logit a sentence it is
# also the *natural* policy gradient. It has one step size, $\eta$.
#
# ### Exercise 1: one step
#
# Write `step(pi, r, eta)` for dictionaries. It is tried on random tables.


# %% tags=["exercise"]
answer = ...  # def step(pi, r, eta): ..., and then answer = step
check("t02.step", answer)


# %% tags=["solution", "hide-cell"]
def step(pi, r, eta):
    weight = {y: pi[y] * math.exp(eta * r[y]) for y in pi}
    total = sum(weight.values())
    return {y: w / total for y, w in weight.items()}


answer = step
check("t02.step", answer)


# %% [markdown]
# ## Two hundred steps
#
# We start from $q$ and take 200 steps of $\eta = 0.1$. (The loop below writes the step out in logits: add $\eta r$ to the
# log-probabilities, then normalise.)


# %%
def multiplicative_steps(r, count, eta=0.1):
    """The policies π_0 = q, π_1, …, π_count."""
    path, logits = [dict(q)], {y: math.log(q[y]) for y in q}
    for _ in range(count):
        logits = {y: logits[y] + eta * r[y] for y in q}
        top = max(logits.values())
        total = math.fsum(math.exp(x - top) for x in logits.values())
        path.append({y: math.exp(x - top) / total for y, x in logits.items()})
    return path


path = multiplicative_steps(r, 200)
rows = [
    [
        k,
        path[k]["the cat"],
        path[k]["a dog"],
        mean_reward(path[k]),
        kl(path[k], q),
        entropy(path[k]),
    ]
    for k in (0, 5, 10, 20, 50, 100, 200)
]
print(
    text_table(
        [
            "step k",
            "P('the cat')",
            "P('a dog')",
            "E[r]",
            "KL(π‖q) in nats",
            "entropy in nats",
        ],
        rows,
        digits=5,
    )
)
print(f"\nafter 200 steps P('a dog') = {path[200]['a dog']:.12f}")

# %% [markdown]
# Look at 'the cat': good, and likely at the start, it *rises* first, and is sacrificed later.
#
# ### Exercise 2: how fast?
#
# After how many steps of $\eta = 0.1$ from $q$ is $P(\text{'a dog'})$ above 0.99 for the first time? (After 0 steps the policy is $q$.)

# %% tags=["exercise"]
answer = ...
check("t02.steps", answer)

# %% tags=["solution", "hide-cell"]
answer = next(k for k, pi in enumerate(path) if pi["a dog"] > 0.99)
check("t02.steps", answer)
# The rival is 'the cat': P('a dog')/P('the cat') = (0.1/0.4)·e^(ηk), and 99 : 1 needs ηk = log(4·99) at least.
print(
    f"{answer} steps; the ratio to 'the cat' alone would give k ≥"
    f" {math.log(4 * 99) / 0.1:.2f}"
)

# %% [markdown]
# ## Every stop on the way is a posterior
#
# Unroll the recursion: $k$ steps multiply $q$ by $e^{\eta r}$ $k$ times, and normalising once at the end is enough,
#
# $$\pi_k(y) = \frac{q(y)\,e^{\eta k\, r(y)}}{Z_k} = \text{the posterior at } \lambda = \frac{1}{\eta k}.$$
#
# This is Bayes' rule: prior $q$, likelihood $e^{r/\lambda}$. Each step is one more piece of the same evidence. After 200 steps of size 0.1 we
# have the posterior at $\lambda = 0.05$. `reference.posterior` computes it without any steps:

# %%
worst = 0.0
for k in range(1, 201):
    bayes, _ = exact_posterior(q, r, 1 / (0.1 * k))
    worst = max(worst, *(abs(bayes[y] - path[k][y]) for y in q))
bayes, _ = exact_posterior(q, r, 1 / (0.1 * 200))
print(f"posterior at λ = {1 / (0.1 * 200):g}: P('a dog') = {bayes['a dog']:.12f}")
print(
    f"largest difference between π_k and the posterior, over all 200 steps: {worst:.1e}"
)
assert worst < 1e-9

# %% [markdown]
# So *training on reward for a while* and *believing the reward with strength* $1/\lambda$ are the same thing. Without a KL term nothing says
# when to stop, $\lambda$ goes to 0, and the posterior of ever more evidence is certain of one sentence.
#
# ### Exercise 3: how far can it go?
#
# As $k \to \infty$, which value does $\mathrm{KL}(\pi_k\|q)$ approach, in nats? (Look at the table, then find it exactly.)

# %% tags=["exercise"]
answer = ...
check("t02.limit", answer)

# %% tags=["solution", "hide-cell"]
# All mass on 'a dog' leaves one term, 1·log(1/q('a dog')): the rarer the favourite was, the farther the collapse.
answer = math.log(1 / q["a dog"])
check("t02.limit", answer)
print(f"log 10 = {answer:.12f} nats; after 200 steps it was {kl(path[200], q):.12f}")

# %% [markdown]
# ### Exercise 4: a tie
#
# Now let 'the cat' and 'a dog' both have reward 2, and the others 0 (`TIED_REWARDS`). Which distribution do the steps from $q$ approach?
# Answer with a dictionary over all four sentences.

# %% tags=["exercise"]
answer = ...
check("t02.tie", answer)

# %% tags=["solution", "hide-cell"]
# Every step multiplies both by the same e^(2η), so they keep the ratio 4 : 1 that q gave them: the limit is q restricted to the best.
best = [y for y in q if TIED_REWARDS[y] == max(TIED_REWARDS.values())]
answer = {y: q[y] / sum(q[x] for x in best) if y in best else 0.0 for y in q}
check("t02.tie", answer)
print(
    ", ".join(
        f"{y} {p:.3f}" for y, p in multiplicative_steps(TIED_REWARDS, 200)[-1].items()
    )
)

# %% [markdown]
# ## An experiment: a network collapses
#
# Does this happen to a neural network that sees samples only? We train a small LSTM on the four sentences twice, from the same weights and
# the same random numbers, by a policy gradient (`losses.rloo`; tutorial 11 takes it apart): once on reward alone, $\lambda = 0$, and once
# with the KL term, $\lambda = 1$. `restrict_to_support` keeps the network to the four sentences that $q$ knows.

# %%
runs = {}
for label, lam in (("reward alone, λ = 0", 0.0), ("with the KL term, λ = 1", 1.0)):
    problem = four_sentences(kl_coef=lam)
    network = restrict_to_support(
        RecurrentModel(problem.space, hidden_size=32, seed=0), problem.prior
    )
    options = {
        "steps": 120,
        "batch_size": 64,
        "lr": 1e-2,
        "schedule": cosine,
        "max_grad_norm": 1.0,
        "draw": seeded_draw(0),
    }
    runs[label] = train(
        network,
        problem,
        losses.rloo,
        target=posterior(problem),
        evaluate_every=10,
        **options,
    )

rows = [
    [
        label,
        run["expected_reward"][0],
        run["expected_reward"][-1],
        run["kl_to_prior"][0],
        run["kl_to_prior"][-1],
    ]
    for label, run in runs.items()
]
print(
    text_table(
        ["run", "E[r] before", "E[r] after", "KL(π‖q) before", "KL(π‖q) after"],
        rows,
        digits=5,
    )
)

# %%
table = []
tokens = posterior(four_sentences()).enumerated().tokens
for label, run in runs.items():
    probabilities = run.policy.log_prob(tokens).exp().tolist()
    pi = dict(zip(four_sentences().space.decode(tokens), probabilities, strict=True))
    table.append([label, *(pi[y] for y in q), entropy(pi)])
print(text_table(["run", *q, "entropy in nats"], table, digits=4))
kept = compare(runs["with the KL term, λ = 1"].policy, posterior(four_sentences()))
print(
    f"\nwith the KL term: KL(π‖π*) = {kept.reverse_kl:.1e} nats from the exact"
    " posterior"
)

# %% [markdown]
# On reward alone the network gets nearly the largest reward there is, 2, and its KL to the prior climbs to the limit of exercise 3. With the KL
# term it stops by itself, at a posterior: it still gives every sentence its share.

# %% mystnb={"image": {"alt": "Left: step by step 'a dog' rises to 1. Right: an LSTM's KL to the prior climbs to log 10 on reward alone."}}
with plots.publication_style():
    figure, (exact, network_axes) = plots.new_figure(2, 3.8, 2.9)
    plots.plot_lines(
        {y: (range(101), [pi[y] for pi in path[:101]]) for y in q},
        exact,
        xlabel="step k, of size η = 0.1",
        ylabel="probability",
    )
    exact.set_title("Each step: the posterior at λ = 1/(ηk)")
    plots.plot_runs(
        runs, "kl_to_prior", network_axes, ylabel="KL(π‖q) in nats", log=False
    )
    network_axes.axhline(
        math.log(10),
        color=plots.BLACK,
        linestyle=":",
        linewidth=1,
        label="one sentence left: log 10",
    )
    network_axes.legend(loc="center right")
    network_axes.set(title="An LSTM learns from samples", ylim=(0, 2.5))
plots.picture(figure, "runs/tutorials/t02")

# %% [markdown]
# ## What to remember
#
# - The best policy for reward alone is a single sentence (or $q$ on the tied best): the collapse is in the question, not in the training.
# - $k$ multiplicative steps of size $\eta$ from $q$ are exactly the posterior at $\lambda = 1/(\eta k)$: to stop early is to choose a $\lambda$.
# - A KL term says $\lambda$ out loud, and training then ends where it should. What it computes there is the next tutorial.

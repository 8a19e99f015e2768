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
# # 3. What does the KL term compute?
#
# Reward alone collapses (tutorial 2). So a penalty is added, and the aim becomes
#
# $$J(\pi) = \mathrm{E}_\pi[r] - \lambda\,\mathrm{KL}(\pi\,\|\,q).$$
#
# It looks like a leash: collect reward, but stay near the prior $q$. This tutorial asks **what that term computes**. The answer
# is Bayes' rule, and it comes with an exact measure of how far any policy is from the best one.

# %%
import math
import random

import torch

from klrl_edu import (
    RecurrentModel,
    compare,
    four_sentences,
    losses,
    plots,
    restrict_to_support,
    seeded_draw,
    train,
)
from klrl_edu import posterior as posterior_of
from klrl_edu.core.display import text_table
from klrl_edu.exercises import check
from klrl_edu.learning.training import cosine
from klrl_edu.problems.examples import FOUR_POLICY, FOUR_REWARDS, FOUR_SENTENCES
from klrl_edu.reference import expectation, kl, objective, posterior, softmax

q, r, pi = FOUR_SENTENCES, FOUR_REWARDS, FOUR_POLICY
lam = 1.0  # λ, in reward units per nat: the price of one nat

# %% [markdown]
# ## Three lines of algebra
#
# Write the KL out and put everything under one mean:
#
# $$J(\pi) = \mathrm{E}_\pi\!\left[r - \lambda \log\frac{\pi}{q}\right]
# = \lambda\,\mathrm{E}_\pi\!\left[\log\frac{q\,e^{r/\lambda}}{\pi}\right]
# = \lambda\,\mathrm{E}_\pi\!\left[\log\frac{\pi^*}{\pi} + \log Z\right]
# = \lambda\log Z - \lambda\,\mathrm{KL}(\pi\,\|\,\pi^*)$$
#
# where we have named
#
# $$\pi^*(y) = \frac{q(y)\,e^{r(y)/\lambda}}{Z}, \qquad Z = \sum_y q(y)\,e^{r(y)/\lambda}.$$
#
# Read it slowly. $\lambda \log Z$ does not depend on $\pi$. KL is never negative and is 0 only at $\pi = \pi^*$. So the
# best policy is $\pi^*$, the best value is $\lambda \log Z$, and **what a policy lacks is exactly $\lambda$ times its KL to $\pi^*$**.
#
# And $\pi^*$ is a Bayesian posterior: $q$ is the prior, $e^{r/\lambda}$ the likelihood, $Z$ the evidence. Here it is, step by step:

# %%
weight = {y: q[y] * math.exp(r[y] / lam) for y in q}
z = sum(weight.values())
star = {y: weight[y] / z for y in q}
print(
    text_table(
        ["sentence", "prior q", "reward r", "q·exp(r/λ)", "posterior π*"],
        [[y, q[y], r[y], weight[y], star[y]] for y in q],
        digits=12,
    )
)
print(f"\nZ = {z:.12f}, λ log Z = {lam * math.log(z):.12f}")

# %% [markdown]
# `reference.posterior` does the same, and takes the largest reward out first so that nothing overflows:

# %%
star, log_z = posterior(q, r, lam)
assert abs(math.exp(log_z) - z) < 1e-9
print(", ".join(f"{y} {p:.12f}" for y, p in star.items()))

# %% [markdown]
# ### Exercise 1: another λ
#
# Compute the posterior at $\lambda = ½$ as a dictionary, with a loop of your own. Before you run it: will it be nearer to $q$ or farther away?

# %% tags=["exercise"]
answer = ...
check("t03.posterior", answer)

# %% tags=["solution", "hide-cell"]
heavier = {y: q[y] * math.exp(r[y] / 0.5) for y in q}
answer = {y: w / sum(heavier.values()) for y, w in heavier.items()}
check("t03.posterior", answer)
# A smaller λ makes a nat cheaper, so the posterior moves farther from q:
print(f"KL(π*‖q): {kl(star, q):.6f} nats at λ = 1, {kl(answer, q):.6f} nats at λ = ½")

# %% [markdown]
# ## The gap, checked
#
# Take the course's policy $\pi = (.5, .2, .1, .2)$. We compute how much it lacks in two ways that share no formula: from the values
# of $J$, and from its distance to $\pi^*$.

# %%
value = lam * log_z
print(
    f"λ log Z − J(π) = {value:.12f} − {objective(pi, q, r, lam):.12f} ="
    f" {value - objective(pi, q, r, lam):.12f}"
)
print(f"λ KL(π‖π*)     = {lam * kl(pi, star):.12f}")
assert abs(value - objective(pi, q, r, lam) - lam * kl(pi, star)) < 1e-9

# %% [markdown]
# One policy could be luck. The identity holds for *every* policy and every $\lambda$; here it is for a thousand random ones.

# %%
generator, worst = random.Random(0), 0.0
for _ in range(1000):
    some = softmax({y: generator.gauss(0, 2) for y in q})
    some_lam = math.exp(generator.uniform(-2, 2))
    some_star, some_log_z = posterior(q, r, some_lam)
    worst = max(
        worst,
        abs(
            some_lam * some_log_z
            - objective(some, q, r, some_lam)
            - some_lam * kl(some, some_star)
        ),
    )
print(f"largest difference between the two sides, over 1000 policies: {worst:.1e}")
assert worst < 1e-9

# %% [markdown]
# ### Exercise 2: the gap at λ = ½
#
# How much does $\pi$ lack at $\lambda = ½$, in reward units?

# %% tags=["exercise"]
answer = ...
check("t03.gap", answer)

# %% tags=["solution", "hide-cell"]
half_star, half_log_z = posterior(q, r, 0.5)
answer = 0.5 * kl(pi, half_star)
check("t03.gap", answer)
print(
    f"λ KL(π‖π*) = {answer:.12f}; λ log Z − J(π) ="
    f" {0.5 * half_log_z - objective(pi, q, r, 0.5):.12f}"
)

# %% [markdown]
# ## The evidence knows the rewards
#
# $\log Z$ is more than a normaliser. As a function of the strength $\beta = 1/\lambda$ it generates the posterior's moments:
#
# $$\log Z(\beta) = \log \mathrm{E}_q\!\left[e^{\beta r}\right], \qquad
# \frac{d \log Z}{d\beta} = \mathrm{E}_{\pi^*}[r], \qquad \frac{d^2 \log Z}{d\beta^2} = \mathrm{Var}_{\pi^*}(r) \ge 0.$$
#
# We let autograd differentiate, and compare with the mean under $\pi^*$:

# %%
beta = torch.tensor(1 / lam, dtype=torch.float64, requires_grad=True)
log_prior = torch.tensor([math.log(q[y]) for y in q], dtype=torch.float64)
rewards = torch.tensor([r[y] for y in q], dtype=torch.float64)
log_evidence = torch.logsumexp(log_prior + beta * rewards, 0)
(slope,) = torch.autograd.grad(log_evidence, beta, create_graph=True)
print(f"d log Z/d(1/λ) = {slope.item():.12f}")
print(f"E_π*[r]        = {expectation(star, lambda y: r[y]):.12f}")
assert abs(slope.item() - expectation(star, lambda y: r[y])) < 1e-9

# %% [markdown]
# ### Exercise 3: the second derivative
#
# The second derivative says how fast the expected reward rises when $1/\lambda$ does. Compute $\mathrm{Var}_{\pi^*}(r)$ at $\lambda = 1$.
# (`star` is the posterior, `expectation(p, f)` takes means.)

# %% tags=["exercise"]
answer = ...
check("t03.variance", answer)

# %% tags=["solution", "hide-cell"]
mean = expectation(star, lambda y: r[y])
answer = expectation(star, lambda y: (r[y] - mean) ** 2)
check("t03.variance", answer)
(curvature,) = torch.autograd.grad(slope, beta)
print(
    f"Var_π*(r) = {answer:.12f}; autograd's second derivative = {curvature.item():.12f}"
)
# A variance is not negative: the expected reward never falls when λ gets smaller.

# %% [markdown]
# ## How far does it go?
#
# The KL penalty keeps the text close to the corpus, says [article C](theory.md#what-five-articles-claim). How close? At the optimum, exactly
# $\mathrm{KL}(\pi^*_\lambda\|q)$. As
# $\lambda$ falls from large to small, reward is bought with nats. No policy gets more reward for the same KL: this is the *frontier*.

# %%
rows = []
for each in (100.0, 10.0, 3.0, 1.0, 0.5, 0.2, 0.05):
    p, _ = posterior(q, r, each)
    rows.append([each, kl(p, q), expectation(p, lambda y: r[y]), p["a dog"]])
print(text_table(["λ", "KL(π*‖q) in nats", "E[r]", "P('a dog')"], rows, digits=6))
spent = [row[1] for row in rows]
assert spent == sorted(spent)

# %% [markdown]
# ### Exercise 4: which reward did it want?
#
# Turn the formula round. Somebody hands you a policy $\pi$, a prior $q$ and $\lambda$. Write `reward_of(pi, q, lam)`: the reward, as a dictionary,
# for which $\pi$ is the posterior, and for which $Z = 1$. (Any constant may be added to a reward without changing $\pi^*$; $Z = 1$ settles
# it.) It is tried on random tables.


# %% tags=["exercise"]
answer = ...  # def reward_of(pi, q, lam): ..., and then answer = reward_of
check("t03.reward", answer)


# %% tags=["solution", "hide-cell"]
def reward_of(pi, q, lam):
    # π = q·exp(r/λ)  <=>  r = λ log π/q
    return {y: lam * math.log(pi[y] / q[y]) for y in pi}


answer = reward_of
check("t03.reward", answer)
back, back_log_z = posterior(q, reward_of(pi, q, 1.0), 1.0)
print(
    "and back again: "
    + ", ".join(f"{y} {p:.3f}" for y, p in back.items())
    + f"; log Z = {abs(back_log_z):.3f}"
)
# Every policy is optimal for some reward. Direct preference optimisation starts from this line.

# %% [markdown]
# ## An experiment: a network finds it from samples
#
# Nothing so far was learned. Now a small LSTM tries: it sees sampled sentences, their rewards, and its own log-probabilities beside the prior's, and
# follows a policy gradient of $J$ (`losses.rloo`). It never sees $\pi^*$ or $Z$. We hold it against both, exactly, every ten steps.

# %%
problem = four_sentences(kl_coef=1.0)
target = posterior_of(problem)
network = restrict_to_support(
    RecurrentModel(problem.space, hidden_size=32, seed=0), problem.prior
)
options = {
    "steps": 200,
    "batch_size": 64,
    "lr": 1e-2,
    "schedule": cosine,
    "max_grad_norm": 1.0,
}
history = train(
    network,
    problem,
    losses.rloo,
    draw=seeded_draw(0),
    target=target,
    evaluate_every=10,
    **options,
)
before, after = history["reverse_kl"][0], history["reverse_kl"][-1]
final = compare(network, target)
print(
    f"KL(π‖π*): {before:.4f} nats before, {after:.1e} nats after {options['steps']}"
    " steps"
)
print(
    f"J(π) = {final.objective:.12f}, and λ log Z = {float(target.value):.12f} is the"
    " best there is"
)

# %% [markdown]
# So close? With the KL term in the reward, the quantity $r - \lambda \log \pi/q$ that the gradient weighs sentences with becomes the *same*
# number, $\lambda \log Z$, for every sentence once $\pi = \pi^*$. All advantages vanish, and the noise of sampling with them:

# %%
tokens = target.enumerated().tokens
learned = dict(
    zip(
        problem.space.decode(tokens),
        network.log_prob(tokens).exp().tolist(),
        strict=True,
    )
)
rows = [[y, star[y], learned[y], r[y] - lam * math.log(learned[y] / q[y])] for y in q]
print(
    text_table(
        ["sentence", "posterior π*", "network π", "r − λ log π/q"], rows, digits=9
    )
)

# %% mystnb={"image": {"alt": "Left: the trained LSTM agrees with π*. Middle: its gap falls by ten orders of magnitude. Right: its path ends on the frontier."}}
with plots.publication_style():
    figure, (bars, curve, frontier) = plots.new_figure(3, 3.5, 3.0)
    plots.plot_posterior(target, {"trained LSTM": network}, bars)
    bars.set_title("The LSTM ends on π*")
    gaps = {"LSTM, RLOO": (history.steps("objective_gap"), history["objective_gap"])}
    plots.plot_lines(
        gaps,
        curve,
        xlabel="training step",
        ylabel="λ log Z − J(π) = λ KL(π‖π*)",
        log=True,
    )
    curve.set_title("What it lacks, exactly")
    optima = [posterior(q, r, math.exp(x / 10))[0] for x in range(-35, 41)]
    lines = {
        "LSTM while it learns": (history["kl_to_prior"], history["expected_reward"]),
        "π* of every λ": (
            [kl(p, q) for p in optima],
            [expectation(p, lambda y: r[y]) for p in optima],
        ),
    }
    plots.plot_lines(lines, frontier, xlabel="KL(π‖q) in nats", ylabel="E[r]")
    frontier.plot(
        kl(star, q),
        expectation(star, lambda y: r[y]),
        "*",
        color=plots.BLACK,
        markersize=10,
        label="π* at λ = 1",
    )
    frontier.legend(loc="lower right")
    frontier.set_title("Reward is bought with nats")
plots.picture(figure, "runs/tutorials/t03")

# %% [markdown]
# ## What to remember
#
# - The KL term turns the search for reward into Bayes' rule: the best policy is $\pi^* \propto q\,e^{r/\lambda}$, and $\lambda$ sets how
#   strongly the reward speaks.
# - $\lambda\log Z - J(\pi) = \lambda\,\mathrm{KL}(\pi\|\pi^*)$ for every policy: on a space that can be listed, "how far from optimal"
#   is an exact number.
# - $\log Z$ is the value of the optimum, and its derivatives are the mean and the variance of the reward there.

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
# # 6. Which of k1, k2, k3 may be differentiated?
#
# A trainer cannot sum over all sentences, so it estimates $\mathrm{KL}(\pi\,\|\,q)$ from samples. There are three well-known formulas for
# that, and every library has an option to choose one. Then the option is put into a loss, and autograd differentiates it. **Is the gradient of
# a good estimate a good estimate of the gradient?** No: of the three, one gives the right gradient, one gives none at all, and the most popular one gives
# the gradient of another divergence.

# %%
import math

from klrl_edu import (
    RecurrentModel,
    SequenceTable,
    audit_gradient,
    audit_value,
    compare,
    four_sentences,
    gaussian_kl,
    kl_gradients,
    kl_values,
    logspace,
    losses,
    plots,
    posterior,
    regularizers,
    restrict_to_support,
    seeded_draw,
    sequence_log_probs,
    train,
)
from klrl_edu.core.display import text_table
from klrl_edu.estimators.advantages import leave_one_out_mean
from klrl_edu.exercises import check
from klrl_edu.learning.training import cosine
from klrl_edu.problems.examples import FOUR_POLICY, FOUR_REWARDS, FOUR_SENTENCES
from klrl_edu.reference import gradient, k1, k2, k3, kl, mean_and_variance

q, r, pi = FOUR_SENTENCES, FOUR_REWARDS, FOUR_POLICY
lam = 1.0  # λ, in reward units per nat

# %% [markdown]
# ## Three estimates of one value
#
# Write $u = \log \pi(y)/q(y)$ for a sentence $y$ drawn from $\pi$. Schulman's three are
#
# $$k_1 = u, \qquad k_2 = \tfrac12 u^2, \qquad k_3 = e^{-u} - 1 + u.$$
#
# $k_1$ is the definition of the KL with the sum left out; one sample of it is often negative, though no KL is. $k_2$ is never
# negative, but its mean is off. $k_3$ adds to $k_1$ something whose mean is zero, $\mathrm{E}_\pi[q/\pi] - 1$, and is never negative either. On four sentences their
# means and variances are plain sums:

# %%
estimators = {"k1": k1(pi, q), "k2": k2(pi, q), "k3": k3(pi, q)}
moments = {name: mean_and_variance(pi, k) for name, k in estimators.items()}
negative = {name: sum(pi[y] for y in pi if k(y) < 0) for name, k in estimators.items()}
print(f"KL(π‖q) = {kl(pi, q):.12f}")
for name, (mean, variance) in moments.items():
    print(
        f"{name}: mean {mean:.12f}, bias {round(mean - kl(pi, q), 14) + 0.0:+.12f},"
        f" variance {variance:.12f}, P(k < 0) = {negative[name]:.2g}"
    )
assert all(abs(moments[name][0] - kl(pi, q)) < 1e-12 for name in ("k1", "k3"))

# %% [markdown]
# $k_3$ wins: no bias, and a variance twenty times smaller. But not always. For two Gaussians at distance $d = \mathrm{KL}$ everything is known in closed
# form, and the term $e^{-u}$ that helps $k_3$ near the prior has a variance that grows as $e^{2d}$:

# %%
distances = (0.005, 0.1, 0.5, 1.0, 2.0)
rows = [
    [
        d,
        *(
            float(getattr(gaussian_kl, name)(d).relative_std)
            for name in ("k1", "k2", "k3")
        ),
    ]
    for d in distances
]
print(text_table(["KL in nats", "std/KL of k1", "of k2", "of k3"], rows, digits=3))
print(f"k3 is noisier than k1 above {gaussian_kl.crossing():.3f} nats")

# %% [markdown]
# One nat from the prior, which is little for a whole answer, $k_1$ is the better of the two unbiased ones.
#
# ### Exercise 1: the KL in your training curve
#
# The curve shows the mean of $k_1$ over 64 sentences. What is the standard deviation of that mean, as a fraction of $\mathrm{KL}(\pi\|q)$?
# (`moments` holds mean and variance of one sample.)

# %% tags=["exercise"]
answer = ...
check("t06.noise", answer)

# %% tags=["solution", "hide-cell"]
answer = math.sqrt(moments["k1"][1] / 64) / kl(pi, q)
check("t06.noise", answer)
print(
    f"{100 * answer:.0f} % of the KL; with k3 it would be"
    f" {100 * math.sqrt(moments['k3'][1] / 64) / kl(pi, q):.0f} %"
)

# %% [markdown]
# ## Then somebody calls backward()
#
# The KL depends on $\pi$ in two places: in the *estimate* $k$, and in *how often* each sentence is drawn. The product rule keeps both. With $s = \nabla \log \pi(y)$,
#
# $$\nabla\,\mathrm{E}_\pi[k] = \nabla \sum_y \pi(y)\,k(y) = \underbrace{\mathrm{E}_\pi[k\,s]}_{\text{the sampling}} +
# \underbrace{\mathrm{E}_\pi[\nabla k]}_{\text{the estimate}}.$$
#
# Autograd sees samples, which are integers, and the formula. It gives the **second half alone**. As $q$ is fixed, $\nabla k(u) = k'(u)\,s$, and the slopes are
#
# $$k_1' = 1, \qquad k_2' = u, \qquad k_3' = 1 - e^{-u}.$$
#
# `gradient(p, f)` is $\mathrm{E}_p[f\,s]$ in sequence logits, so three lines settle it:

# %%
slopes = {
    "k1": lambda y: 1.0,
    "k2": lambda y: math.log(pi[y] / q[y]),
    "k3": lambda y: 1 - q[y] / pi[y],
}
from_loss = {name: gradient(pi, slope) for name, slope in slopes.items()}
reverse = gradient(pi, lambda y: math.log(pi[y] / q[y]))  # ∇KL(π‖q)
forward = {y: pi[y] - q[y] for y in q}  # ∇KL(q‖π)


def vector(table):
    return "(" + ", ".join(f"{x + 0.0:.12g}" for x in table.values()) + ")"


def same(one, other):
    return all(abs(one[y] - other[y]) < 1e-9 for y in one)


for name, one in from_loss.items():
    print(f"E∇{name} = {vector(one)}")
print(f"∇KL(π‖q) = {vector(reverse)}")
print(f"∇KL(q‖π) = {vector(forward)}")
assert same(from_loss["k1"], dict.fromkeys(q, 0.0))
assert same(from_loss["k2"], reverse)
assert same(from_loss["k3"], forward)

# %% [markdown]
# Read it slowly.
#
# - **$k_1$ as a loss does nothing on average.** Its slope is 1 everywhere, and $\mathrm{E}_\pi[s] = 0$. The unbiased estimate has no gradient.
# - **$k_2$ as a loss is right**, though its value is the biased one.
# - **$k_3$ as a loss follows the other KL.** $\mathrm{E}_\pi[(1 - q/\pi)\,s] = -\mathrm{E}_q[s] = \nabla\,\mathrm{KL}(q\,\|\,\pi)$. This is the KL term of GRPO.
#
# ### Exercise 2: k3 as a loss, anywhere
#
# Write `k3_loss(pi, q)`: the expected gradient of $k_3$ in the loss, as a dictionary, in sequence logits. It is tried on random tables. Can you do it without
# a logarithm?


# %% tags=["exercise"]
answer = ...  # def k3_loss(pi, q): ..., and then answer = k3_loss
check("t06.loss", answer)


# %% tags=["solution", "hide-cell"]
def k3_loss(pi, q):
    return {
        y: pi[y] - q[y] for y in pi
    }  # E[(1 − q/π) s] = E_π[s] − E_q[s], and E_q[s] = q − π


answer = k3_loss
check("t06.loss", answer)

# %% [markdown]
# ## In the reward it is the other half
#
# One can also put the estimate into the *reward*, as PPO does: then $k$ is a number, without gradient, and the policy gradient supplies
# $\mathrm{E}_\pi[k\,s]$, the first half alone. The table shows both halves and their sum:


# %%
def add(one, other):
    return {y: one[y] + other[y] for y in one}


def name_of(found):
    known = {"0": dict.fromkeys(q, 0.0), "∇KL(π‖q)": reverse, "∇KL(q‖π)": forward}
    known["∇KL(π‖q) − ∇KL(q‖π)"] = {y: reverse[y] - forward[y] for y in q}
    return next((name for name, one in known.items() if same(found, one)), "neither KL")


halves = {name: (gradient(pi, k), from_loss[name]) for name, k in estimators.items()}
rows = [
    [name, name_of(a), name_of(b), name_of(add(a, b))]
    for name, (a, b) in halves.items()
]
print(
    text_table(["", "in the reward: E[k s]", "in the loss: E[∇k]", "both: ∇E[k]"], rows)
)

# %% [markdown]
# Both unbiased values have the right gradient *as a whole*; the halves are what differ. $k_1$ has all of it in the reward, and that is where it belongs. $k_3$ is wrong in either
# place and right in both together.
#
# ### Exercise 3: k3 in the reward
#
# Compute $\mathrm{E}_\pi[k_3\,s]$ for the course's $\pi$ and $q$, as a dictionary. (Is it a gradient that pulls $\pi$ towards $q$?)

# %% tags=["exercise"]
answer = ...
check("t06.reward", answer)

# %% tags=["solution", "hide-cell"]
answer = gradient(pi, k3(pi, q))
check("t06.reward", answer)
along = sum(answer[y] * reverse[y] for y in q) / sum(reverse[y] ** 2 for y in q)
print(f"{vector(answer)}: its part along ∇KL(π‖q) is {along:+.3f} of it")
# Hardly anything, and here it even points the wrong way: near q, k3 is of second order, and its weight of each sentence says little.

# %% [markdown]
# ## Ask the audit
#
# That was algebra on four numbers. What of a formula from a library, with ratios, `detach()`, and sums over tokens? `audit_gradient` takes *any* loss, enumerates
# every batch that can be drawn, differentiates each, and says what the mean is. It is told nothing about the formula:

# %%
problem = four_sentences(kl_coef=lam)
policy = SequenceTable.from_texts(pi, space=problem.space)


def my_kl_penalty(log_probs, prior_log_probs):
    """What one would write first; log-probabilities of tokens [N,T]."""
    return (log_probs - prior_log_probs).sum(-1).mean()


k3_audit = audit_gradient(kl_gradients.loss_k3, policy, problem)
assert same(dict(zip(q, k3_audit.mean.tolist(), strict=True)), forward)
print(audit_value(kl_values.k3, policy, problem).verdict)
print()
print(k3_audit)
print()
report = audit_gradient(my_kl_penalty, policy, problem)
print(
    f"{report.verdict} The standard deviation of one sample is"
    f" {math.sqrt(report.variance):.3f}, that of loss_k3"
    f" {math.sqrt(k3_audit.variance):.3f}."
)

# %% [markdown]
# So `my_kl_penalty` is not harmless either: it pushes nowhere on average, and hard on every single batch. A curve of the KL cannot tell you this, as the
# *value* in the log is unbiased. The bias is in what nobody plots.
#
# ## Token by token
#
# Libraries sum over tokens: $\sum_t k(u_t)$ with $u_t = \log \pi(y_t|y_{<t})/q(y_t|y_{<t})$, differentiated with the sampled prefix as a given. By the chain rule (tutorial 1)
# the *values* add up to the same KL. The gradients do not:
#
# $$\nabla\,\mathrm{KL}(\pi\,\|\,q) = \mathrm{E}_\pi \sum_t \Big[\nabla\,\mathrm{KL}_t + s_t \sum_{t' > t} \mathrm{KL}_{t'}\Big].$$
#
# The loss per token has the first term. The second says that a token is also to blame for the KL *after* it, and that term is lost. The course's policy shows it in
# the purest form: its first word is distributed as the prior's, but after 'a' it strays farther than after 'the'.

# %%
for word in ("the", "a"):
    after_pi, after_q = (
        {
            y: p[y] / sum(p[x] for x in p if x.startswith(f"{word} "))
            for y in p
            if y.startswith(f"{word} ")
        }
        for p in (pi, q)
    )
    print(f"KL of the second word after '{word}': {kl(after_pi, after_q):.4f}")
rows = []
for name in (
    "loss_k2",
    "loss_k2_token",
    "loss_full_kl",
    "loss_k3_token",
    "rao_blackwell_to_go",
):
    report = audit_gradient(getattr(kl_gradients, name), policy, problem)
    push = dict(zip(q, report.mean.tolist(), strict=True))
    on_first = sum(push[y] for y in q if y.startswith("a "))
    rows.append(
        [
            name,
            (
                report.relative_bias["reverse_kl"]
                if report.relative_bias["reverse_kl"] > 1e-9
                else 0.0
            ),
            on_first if abs(on_first) > 1e-12 else 0.0,
        ]
    )
print(
    text_table(
        ["loss", "bias for ∇KL(π‖q), relative", "derivative by the logit of 'a'"],
        rows,
        digits=3,
    )
)

# %% [markdown]
# Descending the whole KL lowers the odds of 'a'; the losses per token leave the first word alone, even the one with the exact KL at every
# position. `rao_blackwell_to_go` adds the lost term and is right again.
#
# ## When the samples are old
#
# Rollouts are expensive, so several updates are made on one batch. Then the sentences come from an older policy $\mu$, and $\mathrm{E}_\pi$ must be bought with the ratio
# $\rho = \pi/\mu$. Now it matters whether autograd may look into it:
#
# $$\nabla\,\mathrm{E}_\mu[\rho\,k] = \mathrm{E}_\mu[\rho\,(k\,s + \nabla k)] = \nabla\,\mathrm{KL}(\pi\,\|\,q),
# \qquad \mathrm{E}_\mu[\rho_{\text{detached}}\,\nabla k] = \mathrm{E}_\pi[\nabla k].$$
#
# A *live* ratio brings the missing half back, even on-policy, where it is 1 and seems to do nothing. A detached one repairs the sampling only.

# %%
mu = {"the cat": 0.25, "the dog": 0.3, "a cat": 0.35, "a dog": 0.1}
older = SequenceTable.from_texts(mu, space=problem.space)
meant = {
    "loss_k1": "k1, no ratio",
    "loss_k2": "k2, no ratio",
    "loss_k3": "k3, no ratio",
    "detached_ratio_k3": "k3, detached ratio",
    "live_ratio_k3_token": "k3, live ratio of each token",
    "live_ratio_k3": "k3, live ratio of the sentence",
}
rows = []
for name, label in meant.items():
    reports = [
        audit_gradient(getattr(kl_gradients, name), policy, problem, behaviour=drawn_by)
        for drawn_by in (policy, older)
    ]
    biases = [one.relative_bias["reverse_kl"] for one in reports]
    rows.append(
        [
            label,
            *(bias if bias > 1e-9 else 0.0 for bias in biases),
            math.sqrt(reports[1].variance),
        ]
    )
print(
    text_table(
        ["in the loss", "bias on π's samples", "on μ's samples", "std on μ's samples"],
        rows,
        digits=3,
    )
)

# %% [markdown]
# On old samples even $k_2$ is wrong without a ratio, and $k_1$ is no longer nothing.
#
# ### Exercise 4: k1 on old samples
#
# Write `stale_k1(pi, mu)`: the expected gradient of $k_1$ as a loss when the sentences come from $\mu$ and nobody weighs them, as a dictionary in sequence logits.
# What does descending it do to $\pi$?


# %% tags=["exercise"]
answer = ...  # def stale_k1(pi, mu): ..., and then answer = stale_k1
check("t06.stale", answer)


# %% tags=["solution", "hide-cell"]
def stale_k1(pi, mu):
    return {y: mu[y] - pi[y] for y in pi}  # E_μ[s]


answer = stale_k1
check("t06.stale", answer)
found = audit_gradient(
    kl_gradients.loss_k1, policy, problem, behaviour=older
).mean.tolist()
assert same(answer(pi, mu), dict(zip(q, found, strict=True)))
# E_μ[s] = −∇KL(μ‖π): descending it climbs KL(μ‖π). The 'penalty' drives π away from the policy that drew the samples, and q plays no part in it.

# %% [markdown]
# ## An experiment: where does each one end?
#
# A wrong gradient that pulls roughly the right way may be good enough. So we train a small LSTM on the reward with each of four KL terms, everything else alike, and
# look where it ends. The audit says beforehand what each follows:


# %%
def with_kl_loss(penalty):
    def loss(batch):
        reward = batch.rewards.sum(-1)
        advantage = reward - leave_one_out_mean(reward, batch.group)
        return -(advantage * batch.log_probs.sum(-1)).mean() + lam * penalty(
            batch.log_probs, batch.prior_log_probs
        )

    loss.__name__ = f"reward with {penalty.__name__}"
    return loss


placements = {"k1 in the reward": losses.rloo}
placements |= {
    f"{k} in the loss": with_kl_loss(getattr(kl_gradients, f"loss_{k}"))
    for k in ("k2", "k3", "k1")
}
for loss in placements.values():
    print(audit_gradient(loss, policy, problem, batch_size=2).verdict)

# %% [markdown]
# Two ascend $J$ and must end on $\pi^*$. The third ascends $\mathrm{E}[r] - \lambda\,\mathrm{KL}(q\,\|\,\pi)$, which has an optimum of its own. Setting the derivative of
# $\sum_y \pi\,r + \lambda \sum_y q \log \pi - \nu \sum_y \pi$ to zero gives
#
# $$\pi(y) = \frac{\lambda\,q(y)}{\nu - r(y)}, \qquad \nu > \max r \text{ such that it sums to one.}$$
#
# ### Exercise 5: the end of k3
#
# Write `forward_optimum(q, r, lam)`: that distribution, as a dictionary. $\nu$ has no formula; halve an interval until it is found. It is tried on random problems.


# %% tags=["exercise"]
answer = ...  # def forward_optimum(q, r, lam): ..., and then answer = forward_optimum
check("t06.end", answer)


# %% tags=["solution", "hide-cell"]
def forward_optimum(q, r, lam):
    low, high = max(r.values()), max(r.values()) + lam  # at `high` the sum is at most 1
    for _ in range(100):
        nu = (low + high) / 2
        too_much = sum(lam * q[y] / (nu - r[y]) for y in q) > 1
        low, high = (nu, high) if too_much else (low, nu)
    return {y: lam * q[y] / (high - r[y]) for y in q}


answer = forward_optimum
check("t06.end", answer)
print(
    "at λ = 1:"
    f" {', '.join(f'{y} {p:.4f}' for y, p in forward_optimum(q, r, lam).items())}"
)

# %% [markdown]
# The package knows that optimum as `regularizers.optimum("forward_kl", …)`. Now train:

# %%
target = posterior(problem)
support = target.enumerated()
sentences = problem.space.decode(support.tokens)
k3_end = regularizers.optimum(
    "forward_kl", support.log_prior, support.rewards, lam
).log_probs
options = {
    "steps": 300,
    "batch_size": 64,
    "lr": 1e-2,
    "schedule": cosine,
    "max_grad_norm": 1.0,
    "target": target,
    "evaluate_every": 10,
}
curves, ends, rows = {}, {}, []
for name, loss in placements.items():
    network = restrict_to_support(
        RecurrentModel(problem.space, hidden_size=32, seed=0), problem.prior
    )
    history = train(network, problem, loss, draw=seeded_draw(0), **options)
    curves[name] = (history.steps("reverse_kl"), history["reverse_kl"])
    log_pi = sequence_log_probs(network, support.tokens).detach()
    ends[name] = log_pi.exp().tolist()
    final = compare(network, target)
    rows.append(
        [
            name,
            final.reverse_kl,
            float(logspace.kl_divergence(log_pi, k3_end)),
            final.objective_gap,
            final.kl_to_prior,
        ]
    )
print(
    text_table(
        ["KL term", "KL(π‖π*)", "KL(π‖k3's end)", "λ log Z − J(π)", "KL(π‖q)"],
        rows,
        digits=3,
    )
)
print(
    "and k3's end itself lacks λ KL(k3's end‖π*) ="
    f" {lam * float(logspace.kl_divergence(k3_end, target.log_probs)):.6f}"
)

# %% [markdown]
# - With $k_1$ in the reward the LSTM ends on $\pi^*$ to the last digits: all advantages become equal there, and the noise vanishes with them (tutorial 3).
# - With $k_2$ in the loss it ends near $\pi^*$; the mean gradient is right, but the noise stays, because the baseline knows the
#   reward alone and not the KL that goes with it.
# - With $k_3$ in the loss it ends on *its* optimum, not on $\pi^*$, and no number of steps will change that.
# - With $k_1$ in the loss there is no KL term at all: it collapses on 'a dog' as in tutorial 2, with a KL coefficient in its config and a KL in its log.

# %% mystnb={"image": {"alt": "Left: expected gradients of k1, k2 and k3 as a loss; k1's is zero. Middle: KL(π‖π*) while training; only k1 in the reward and k2 in the loss fall to zero. Right: where each ends."}}
with plots.publication_style():
    figure, (pushes, course, end) = plots.new_figure(3, 3.6, 3.1)
    colours = dict(
        zip(
            placements,
            (plots.VERMILION, plots.GREEN, plots.PURPLE, plots.ORANGE),
            strict=True,
        )
    )
    shown = {
        "k1: nothing": ("k1", "k1 in the loss"),
        "k2: ∇KL(π‖q)": ("k2", "k2 in the loss"),
        "k3: ∇KL(q‖π)": ("k3", "k3 in the loss"),
    }
    for index, (label, (name, placement)) in enumerate(shown.items()):
        places = [x + 0.27 * (index - 1) for x in range(len(q))]
        pushes.bar(
            places,
            list(from_loss[name].values()),
            0.27,
            color=colours[placement],
            label=label,
        )
        if name == "k1":
            pushes.plot(
                places,
                [0.0] * len(q),
                "_",
                color=colours[placement],
                markersize=9,
                markeredgewidth=3,
            )
    pushes.axhline(0, color=plots.BLACK, linewidth=0.8)
    pushes.set_xticks(range(len(q)), list(q))
    pushes.set(
        ylabel="expected gradient",
        xlabel="logit of",
        title="As a loss: three different things",
    )
    pushes.legend(loc="upper center")
    plots.plot_lines(
        curves, course, xlabel="training step", ylabel="KL(π‖π*) in nats", log=True
    )
    course.set_title("Two of four reach π*")
    course.legend(loc="lower left")
    star = dict(zip(sentences, target.log_probs.exp().tolist(), strict=True))
    for shift, (label, values, colour) in zip(
        (-0.2, 0.2),
        (
            ("π*", star, plots.POSTERIOR_COLOUR),
            (
                "optimum with KL(q‖π)",
                dict(zip(sentences, k3_end.exp().tolist(), strict=True)),
                plots.PRIOR_COLOUR,
            ),
        ),
        strict=True,
    ):
        end.bar(
            [x + shift for x in range(len(q))],
            [values[y] for y in q],
            0.38,
            color=colour,
            label=label,
        )
    for (name, values), marker, shift in zip(
        ends.items(), "os^D", (-0.28, -0.12, 0.2, 0.4), strict=True
    ):
        by_sentence = dict(zip(sentences, values, strict=True))
        places = [x + shift for x in range(len(q))]
        end.plot(
            places,
            [by_sentence[y] for y in q],
            marker,
            color=colours[name],
            markeredgecolor="white",
            markersize=6,
            label=name,
            clip_on=False,
        )
    end.set_xticks(range(len(q)), list(q))
    end.set(
        ylabel="probability", xlabel="sentence", title="Where each ends", ylim=(0, 1.05)
    )
    end.legend(loc="upper left", fontsize=7)
plots.picture(figure, "runs/tutorials/t06")

# %% [markdown]
# ## What to remember
#
# - $\nabla\,\mathrm{E}[k] = \mathrm{E}[k\,s] + \mathrm{E}[\nabla k]$: the reward gives the first half, the loss the second. A good value is not a good loss.
# - As a loss, on-policy: $k_1$ follows nothing, $k_2$ follows $\nabla\,\mathrm{KL}(\pi\|q)$, $k_3$ follows $\nabla\,\mathrm{KL}(q\|\pi)$. In the reward, $k_1$ is right.
# - Per token, a loss forgets that a token is to blame for later KL. Off-policy, only a live ratio of the sentence (or of the prefix) restores the gradient; a detached one
#   repairs the sampling, not the missing half.
# - Do not believe a name. `audit_gradient(loss, policy, problem)` says what a loss follows.

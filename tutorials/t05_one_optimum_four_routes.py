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
# %% [markdown]
# # 5. One optimum, four routes?
#
# So far we wrote the best policy down: $\pi^* \propto q\,e^{r/\lambda}$. Reinforcement learning does not write it down, it *searches*, and it has four ways
# to do so: compute **values** backwards, learn them from experience (**Q-learning**), learn the world and **plan** in it, or climb a **policy gradient**.
# **Do they all end at the posterior?** On four sentences each can be held against it. Then we meet a world that answers, where it matters which one is taken.

# %%
import math
from dataclasses import replace

import torch

from klrl_edu import (
    RecurrentModel,
    four_sentences,
    losses,
    plots,
    posterior,
    restrict_to_support,
    seeded_draw,
    train,
)
from klrl_edu.core.display import text_table
from klrl_edu.decisions.decision_learning import (
    plan_on_estimate,
    policy_gradient_learning,
    soft_q_learning,
)
from klrl_edu.decisions.decision_process import token_process
from klrl_edu.decisions.dialogue import compare_plans, dialogue
from klrl_edu.decisions.model_error import trajectory_value
from klrl_edu.decisions.soft_control import objective_gap, value_iteration
from klrl_edu.exercises import check
from klrl_edu.learning.training import cosine
from klrl_edu.problems.examples import FOUR_POLICY, FOUR_REWARDS, FOUR_SENTENCES
from klrl_edu.reference import kl, objective
from klrl_edu.reference import posterior as posterior_of

q, r, pi = FOUR_SENTENCES, FOUR_REWARDS, FOUR_POLICY
lam = 1.0  # λ, in reward units per nat
star, log_z = posterior_of(q, r, lam)

# %% [markdown]
# ## Sentences as decisions
#
# A *decision process* has states $s$, actions $a$ with a prior $q(a|s)$, rewards $r(s,a)$, and a world that answers with the next state,
# $P(s'|s,a)$. Writing is one: the state is what stands there so far, the action is the next word, and the world simply appends it. A discount
# $\gamma \le 1$ makes later rewards worth less; for sentences $\gamma = 1$.
#
# ### Route 1: values
#
# Know the process, and work backwards. This is tutorial 4 with $P$ and $\gamma$ written out:
#
# $$Q(s,a) = r(s,a) + \gamma \sum_{s'} P(s'|s,a)\,V(s'), \qquad V(s) = \lambda \log \sum_a q(a|s)\,e^{Q(s,a)/\lambda}, \qquad
# \pi^*(a|s) = q(a|s)\,e^{(Q(s,a)-V(s))/\lambda}.$$

# %%
problem = four_sentences(kl_coef=lam)
target = posterior(problem)
writing = token_process(problem)
by_values = value_iteration(writing, lam)
print(by_values)
print(f"V(∅) = {by_values.value:.12f}, λ log Z = {lam * log_z:.12f}")
steps = {
    state: dict(zip(writing.actions, row, strict=True))
    for state, row in zip(
        writing.states, by_values.log_policy.exp().tolist(), strict=True
    )
}
written = {y: steps["∅"][y.split()[0]] * steps[y.split()[0]][y.split()[1]] for y in q}
assert abs(by_values.value - lam * log_z) < 1e-9
assert all(abs(written[y] - star[y]) < 1e-9 for y in q)

# %% [markdown]
# Two sweeps, one for each word, and the posterior is there. **Route 1 arrives, without a single sample.**
#
# ### Route 2: Q-learning
#
# Now do not know the process, but see a step of it: in state $s$ the action $a$ was taken, it paid $r$, and $s'$ came next. Move the old
# estimate a part $\alpha$ of the way to what this step says:
#
# $$Q(s,a) \leftarrow (1-\alpha)\,Q(s,a) + \alpha\,\big(r + \gamma V(s')\big), \qquad V(s') = \lambda \log \sum_{a'} q(a'|s')\,e^{Q(s',a')/\lambda}.$$

# %% [markdown]
# ### Exercise 1: one update
#
# Write `update(old, reward, prior, values, lam, gamma, alpha)`: the new $Q(s,a)$. `old` is the old one; `prior` and `values` are dictionaries of
# $q(a'|s')$ and $Q(s',a')$. It is tried on random numbers.


# %% tags=["exercise"]
# def update(old, reward, prior, values, lam, gamma, alpha): ..., then answer = update
answer = ...
check("t05.update", answer)


# %% tags=["solution", "hide-cell"]
def update(old, reward, prior, values, lam, gamma, alpha):
    soft = lam * math.log(sum(prior[a] * math.exp(values[a] / lam) for a in prior))
    return (1 - alpha) * old + alpha * (reward + gamma * soft)


answer = update
check("t05.update", answer)

# %% [markdown]
# Much depends on this one line, and two articles print others. Taken as it stands, one on feedback from an AI ([article E](theory.md#what-five-articles-claim))
# says $Q(s,a) = \alpha r + (1-\alpha)\max_{a'} Q(s',a')$:
# $\alpha$ weighs the reward against the future, and the old $Q$ is gone. The other, on policy gradients and models, signed
# 禅与计算机程序设计艺术 ([article D](theory.md#what-five-articles-claim)), says $Q(s,a) = \sum_{s'} P(s'|s,a) \max_{a'} Q(s',a')$: no
# reward at all. Textbooks have a third, our line with $\max_{a'} Q(s',a')$ in place of $V(s')$. We run each with $\alpha = ½$ until nothing moves, read the
# policy $q\,e^{Q/\lambda}$ off, and measure what it lacks.

# %%
first_words = {
    a: sum(p for y, p in q.items() if y.startswith(a + " ")) for a in ("the", "a")
}
prior_after = {
    "": first_words,
    **{
        a: {y.split()[1]: q[y] / first_words[a] for y in q if y.startswith(a + " ")}
        for a in first_words
    },
}


def soft(state, values):
    return lam * math.log(
        sum(p * math.exp(values[a] / lam) for a, p in prior_after[state].items())
    )


def hard(state, values):
    return max(values.values())


def settle(rule, look_ahead, alpha=0.5, rounds=200):
    """Runs an update over all states and actions in turn, from Q = 0.

    Nothing follows a second word.
    """
    table = {state: dict.fromkeys(prior, 0.0) for state, prior in prior_after.items()}
    for _ in range(rounds):
        for state, row in table.items():
            for action in row:
                after = f"{state} {action}".strip()
                ahead = look_ahead(after, table[after]) if after in table else 0.0
                row[action] = rule(row[action], r.get(after, 0.0), ahead, alpha)
    return table


def policy_of(table):
    def step(state, action):
        return prior_after[state][action] * math.exp(
            (table[state][action] - soft(state, table[state])) / lam
        )

    return {y: step("", y.split()[0]) * step(*y.split()) for y in q}


updates = {
    "soft value (ours)": (
        lambda old, reward, ahead, alpha: (1 - alpha) * old + alpha * (reward + ahead),
        soft,
    ),
    "maximum (textbook)": (
        lambda old, reward, ahead, alpha: (1 - alpha) * old + alpha * (reward + ahead),
        hard,
    ),
    "α r + (1 − α) max": (
        lambda old, reward, ahead, alpha: alpha * reward + (1 - alpha) * ahead,
        hard,
    ),
    "no reward": (lambda old, reward, ahead, alpha: ahead, hard),
}
rows, lacking = [], {}
for name, (rule, look_ahead) in updates.items():
    table = settle(rule, look_ahead)
    found = policy_of(table)
    lacking[name] = lam * log_z - objective(found, q, r, lam)
    rows.append(
        [
            name,
            table[""]["the"],
            table[""]["a"],
            found["a dog"],
            f"{lacking[name]:.12f}",
        ]
    )
print(
    text_table(
        ["target", "Q(∅, the)", "Q(∅, a)", "P('a dog')", "lacks"], rows, digits=9
    )
)
print(
    f"V(the) = {float(by_values.state_values[1]):.9f}, V(a) ="
    f" {float(by_values.state_values[2]):.9f}; π*('a dog') = {star['a dog']:.9f}"
)
assert abs(lacking["soft value (ours)"]) < 1e-9 < 1e-3 < lacking["maximum (textbook)"]
assert (
    abs(lacking["no reward"] - lam * kl(q, star)) < 1e-9
)  # from Q = 0 it never leaves the prior

# %% [markdown]
# **Route 2 arrives with the soft value, and only with it.** The maximum expects a perfect second word, which $\pi^*$ does not choose. The update
# with $\alpha$ on the reward halves the rewards, and halves them again a word earlier. The one without reward stays where it started: here at the prior.

# %% [markdown]
# ### Exercise 2: the price of the maximum
#
# The textbook's target gives $Q(\varnothing, \text{the}) = 1$ and $Q(\varnothing, \text{a}) = 2$, and the right second words. How much does its
# policy lack, in reward units? Find it from the *first word* alone. (`star` is the posterior, `first_words` the prior's first word.)

# %% tags=["exercise"]
answer = ...
check("t05.hard", answer)

# %% tags=["solution", "hide-cell"]
best = {"the": 1.0, "a": 2.0}
weight = {a: first_words[a] * math.exp(best[a] / lam) for a in best}
by_maximum = {a: w / sum(weight.values()) for a, w in weight.items()}
star_first = {a: sum(p for y, p in star.items() if y.startswith(a + " ")) for a in best}
answer = lam * kl(by_maximum, star_first)
check("t05.hard", answer)
print(f"{answer:.12f}, and the table above says {lacking['maximum (textbook)']:.12f}")
# The gap is a sum over states: λ Σ d(s) KL(π(·|s)‖π*(·|s)), d(s) the visits of π. Only the first state contributes here.

# %% [markdown]
# ### Route 3: learn the world, then plan in it
#
# Count what followed what, call the frequencies $\hat P$, and take route 1 in the estimated world. The plan is wrong where $\hat P$ is, and how
# wrong it can be is known. With $\hat V$ its values and $H$ the longest path,
#
# $$J(\pi^*) - J(\hat\pi) \;\le\; 2 H \max_{s,a} \Big|\sum_{s'} (P - \hat P)(s'|s,a)\,\hat V(s')\Big| \qquad (\gamma = 1).$$
#
# We let the prior write, and plan on what was seen. (Each count starts with one observation that is spread over all states: we pretend
# not to know that the world only appends words.)

# %%
checkpoints = [16, 64, 256, 1_024, 4_096, 16_384]
planned = plan_on_estimate(writing, lam, checkpoints, seeded_draw(0))
rows = [
    list(row)
    for row in zip(planned.transitions, planned.gaps, planned.model_bounds, strict=True)
]
print(text_table(["words read", "the plan lacks", "at most (bound)"], rows, digits=3))
assert all(gap <= bound for _, gap, bound in rows)

# %% [markdown]
# **Route 3 arrives as the model becomes right.** The bound is honest and generous: it charges the worst error everywhere. For text it is
# the easy route, since the world is known. Tree search over words is planning, and with soft values it is tutorial 4.
#
# ### Route 4: the policy gradient
#
# Forget values. Give every sentence a logit $\theta(y)$, $\pi = \mathrm{softmax}\,\theta$, and climb $J$. Tutorial 3 says
# $J(\pi) = \lambda \log Z - \lambda\,\mathrm{KL}(\pi\|\pi^*)$, so its gradient knows the posterior already:
#
# $$\frac{\partial J}{\partial \theta(y)} = \pi(y)\Big(r(y) - \lambda \log\frac{\pi(y)}{q(y)} - J(\pi)\Big)
# = -\lambda\,\frac{\partial}{\partial \theta(y)}\,\mathrm{KL}(\pi\,\|\,\pi^*).$$
#
# The left side needs only rewards and log-probabilities. We take it, and let autograd differentiate the KL on the right, for $\pi = (.5, .2, .1, .2)$:

# %%
gradient = {
    y: pi[y] * (r[y] - lam * math.log(pi[y] / q[y]) - objective(pi, q, r, lam))
    for y in q
}
theta = torch.tensor(
    [math.log(pi[y]) for y in q], dtype=torch.float64, requires_grad=True
)
log_pi, log_star = (
    torch.log_softmax(theta, 0),
    torch.tensor([math.log(star[y]) for y in q], dtype=torch.float64),
)
(kl_gradient,) = torch.autograd.grad((log_pi.exp() * (log_pi - log_star)).sum(), theta)
rows = [
    [y, f"{gradient[y]:.12f}", f"{-lam * slope:.12f}"]
    for y, slope in zip(q, kl_gradient.tolist(), strict=True)
]
print(text_table(["sentence", "∂J/∂θ", "−λ ∂KL(π‖π*)/∂θ"], rows))
assert all(
    abs(gradient[y] + lam * slope) < 1e-9
    for y, slope in zip(q, kl_gradient.tolist(), strict=True)
)

# %% [markdown]
# To climb $J$ *is* to approach $\pi^*$: the gradient vanishes there and nowhere else inside. **Route 4 arrives.**

# %% [markdown]
# ### Exercise 3: the gradient
#
# Write `gradient_of(pi, q, r, lam)`: $\partial J/\partial\theta$ in sequence logits, as a dictionary. It is tried on random tables.


# %% tags=["exercise"]
# def gradient_of(pi, q, r, lam): ..., then answer = gradient_of
answer = ...
check("t05.gradient", answer)


# %% tags=["solution", "hide-cell"]
def gradient_of(pi, q, r, lam):
    worth = {y: r[y] - lam * math.log(pi[y] / q[y]) for y in pi}
    mean = sum(pi[y] * worth[y] for y in pi)  # J(π)
    return {y: pi[y] * (worth[y] - mean) for y in pi}


answer = gradient_of
check("t05.gradient", answer)
print(
    "at π*: "
    + ", ".join(f"{abs(slope):.0e}" for slope in gradient_of(star, q, r, lam).values())
)

# %% [markdown]
# How many steps? That depends on what a step is. The *natural* gradient measures steps in the policy instead of in the logits; for a softmax that
# cancels the factor $\pi(y)$, and the step multiplies:
#
# $$\pi(y) \;\leftarrow\; \pi(y)\,e^{\eta\,(r(y) - \lambda \log \pi(y)/q(y))} \,/\, \text{sum} \;=\; \pi(y)^{1-\eta\lambda}\,q(y)^{\eta\lambda}\,e^{\eta r(y)} \,/\, \text{sum}.$$
#
# At $\eta = 1/\lambda$ the old policy drops out, and what remains is $q\,e^{r/\lambda}$: **one step, from anywhere, to the posterior**.

# %% [markdown]
# ### Exercise 4: a natural step
#
# Write `natural_step(pi, q, r, lam, eta)`: the policy after it, as a dictionary that sums to 1.


# %% tags=["exercise"]
# def natural_step(pi, q, r, lam, eta): ..., then answer = natural_step
answer = ...
check("t05.natural", answer)


# %% tags=["solution", "hide-cell"]
def natural_step(pi, q, r, lam, eta):
    weight = {
        y: pi[y] * math.exp(eta * (r[y] - lam * math.log(pi[y] / q[y]))) for y in pi
    }
    return {y: w / sum(weight.values()) for y, w in weight.items()}


answer = natural_step
check("t05.natural", answer)
for eta in (0.1, 0.5, 1.0):
    print(
        f"KL to π* after one natural step of η = {eta:g}:"
        f" {abs(kl(natural_step(pi, q, r, lam, eta), star)):.6f}; before"
        f" {kl(pi, star):.6f}"
    )

# %% [markdown]
# Autograd agrees, with the Fisher matrix $F = \mathrm{diag}(\pi) - \pi\pi^\top$ and one step $\theta + F^{+}\nabla J/\lambda$:

# %%
p = log_pi.detach().exp()
fisher = torch.diag(p) - torch.outer(p, p)
stepped = torch.softmax(
    theta.detach() + torch.linalg.pinv(fisher) @ (-lam * kl_gradient) / lam, 0
)
print(
    "largest difference to π* after one step:"
    f" {float((stepped - log_star.exp()).abs().max()):.0e}"
)
assert float((stepped - log_star.exp()).abs().max()) < 1e-9

# %% [markdown]
# ## A world that answers
#
# Sentences hide half of the subject: the world never surprises. Let somebody talk back. An assistant gets a *vague* request. Its prior mostly
# answers at once; it may also ask, which costs a little and usually makes things clear; or make a bold guess, which now and then
# delights. How the user replies is chance, $P(s'|s,a)$, and **no policy chooses it**.

# %% [markdown]
# ### Exercise 5: what an action is worth
#
# Write `action_value(reward, replies, values, lam, gamma)`: the worth of an action that pays `reward` and after which the user moves to state $s'$
# with probability `replies[s']`, worth `values[s']`. Mind who chooses. It is tried on random numbers.


# %% tags=["exercise"]
# def action_value(reward, replies, values, lam, gamma): ..., and then answer = action_value
answer = ...
check("t05.replies", answer)


# %% tags=["solution", "hide-cell"]
def action_value(reward, replies, values, lam, gamma):
    return reward + gamma * sum(replies[s] * values[s] for s in replies)


answer = action_value
check("t05.replies", answer)
# λ stands only where we choose: soft over our actions, a plain mean over the user's replies.

# %% [markdown]
# Now plan, once rightly and three times with something wrong: with no patience ($\gamma = 0$); as if each action had only its *most likely*
# reply; and as if the replies were ours to choose. The last promises $V(s) = \lambda \log \sum_{a,s'} q(a|s)\,P(s'|s,a)\,e^{(r + \gamma V(s'))/\lambda}$,
# and it is no straw man: without discount it is the posterior over whole conversations, $q(\tau)\,e^{r(\tau)/\lambda}/Z$,
# which tilts *everything* in $\tau$ towards reward, the user too.

# %%
talk, price = dialogue(discount=0.95), 0.1  # the process, and its λ
plans = compare_plans(talk, price)
rows = [
    [name, f"{row['promised']:.9f}", f"{row['earned']:.9f}", f"{row['lost']:.9f}"]
    for name, row in plans.to_dict().items()
]
print(text_table(["plan", "promised", "earned", "lost"], rows))
start = talk.states.index("vague")
first = {
    name: dict(zip(talk.actions, row[start].exp().tolist(), strict=True))
    for name, row in plans.log_policies.items()
}
print()
print(
    text_table(
        ["plan", "answer", "ask", "guess"],
        [[name, p["answer"], p["ask"], p["guess"]] for name, p in first.items()],
        digits=4,
    )
)
for (
    name,
    log_policy,
) in plans.log_policies.items():  # the gap again, as λ Σ d(s) KL(π(·|s)‖π*(·|s))
    assert (
        abs(objective_gap(value_iteration(talk, price), log_policy) - plans.loss(name))
        < 1e-9
    )
assert (
    plans.promised["chosen replies"]
    > plans.earned["optimal"]
    > plans.earned["prior"]
    > plans.earned["chosen replies"]
)

# %% [markdown]
# The good plan asks. The impatient one answers, because an answer pays now, and earns less than the untrained prior. The plan on most likely
# replies promises too much and loses little. **The plan that chooses replies promises several times what anybody can earn, guesses far too
# often because it believes the user will be delighted, and earns the least.**
#
# Its promise is what it says above: the value of *its own* plan, discounted step by step. It is $\lambda \log Z$ of the posterior over
# conversations at $\gamma = 1$ only. Below that, the posterior weighs a conversation by its discounted return, $Z = E_q\,e^{\sum_t \gamma^t r_t/\lambda}$:
# late rewards shrink against the one $\lambda$, while the plan shrinks late values, $\lambda$ included. Both numbers, side by side:


# %%
def log_evidence(process, lam, steps=400):
    """λ log E_q[e^{Σ γ^t r_t/λ}] of whole conversations, from the last step back."""
    values = torch.zeros(len(process.states), dtype=torch.float64)
    log_path = process.log_prior[:, :, None] + process.transitions.log()
    for t in reversed(range(steps)):
        worth = process.discount**t * process.rewards[:, :, None] + values
        soft_value = lam * torch.logsumexp((log_path + worth / lam).flatten(1), -1)
        values = torch.where(process.terminal, 0.0, soft_value)
    return float(values[process.states.index("vague")])


rows = []
for gamma in (0.95, 1.0):
    process = replace(talk, discount=gamma)
    promise, evidence = (
        trajectory_value(process, price).value,
        log_evidence(process, price),
    )
    rows.append([f"{gamma:g}", f"{promise:.6f}", f"{evidence:.6f}"])
print(text_table(["γ", "the plan's promise", "λ log Z of the discounted return"], rows))
assert rows == [["0.95", "1.632841", "1.623428"], ["1", "1.811845", "1.811845"]]

# %% [markdown]
# Why did tutorials 3 and 4 not warn us? Where the world only appends words, there is
# nothing to choose in its place, and the two agree:

# %%
print(
    f"posterior over texts: {trajectory_value(writing, lam).value:.12f}, attainable:"
    f" {by_values.value:.12f}"
)
assert abs(trajectory_value(writing, lam).value - by_values.value) < 1e-9

# %% [markdown]
# Patience decides too. The first action of the best policy, as $\gamma$ rises from 0 to 1:

# %%
patience = [k / 20 for k in range(21)]
opening = {name: [] for name in ("answer", "ask", "guess")}
for gamma in patience:
    row = (
        value_iteration(replace(talk, discount=gamma), price)
        .log_policy[start]
        .exp()
        .tolist()
    )
    for name, shares in opening.items():
        shares.append(row[talk.actions.index(name)])
turn = next(
    gamma
    for gamma, ask, answers in zip(
        patience, opening["ask"], opening["answer"], strict=True
    )
    if ask > answers
)
print(f"from γ = {turn:g} on the best policy asks more often than it answers")

# %% [markdown]
# ## An experiment: four learners, one target
#
# Back to the four sentences, now with learners that pay for every word they see: soft Q-learning and planning read the prior's texts, a table of logits climbs a
# sampled policy gradient on its own texts, and so does an LSTM (`losses.rloo`). None is shown $\pi^*$; we hold each against it exactly.

# %%
words_seen = [2**k for k in range(4, 15)]
gradient_steps = {"episodes": 32, "learning_rate": 1.0}
curves = {
    "soft Q-learning": soft_q_learning(writing, lam, words_seen, seeded_draw(0)),
    "planning": plan_on_estimate(writing, lam, words_seen, seeded_draw(0)),
    "policy gradient": policy_gradient_learning(
        writing, lam, words_seen, seeded_draw(0), **gradient_steps
    ),
}
lines = {name: (curve.transitions, curve.gaps) for name, curve in curves.items()}
network = restrict_to_support(
    RecurrentModel(problem.space, hidden_size=32, seed=0), problem.prior
)
options = {
    "steps": 160,
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
words = [2 * options["batch_size"] * step for step in history.steps("objective_gap")]
lines["LSTM (RLOO)"] = (words[1:], history["objective_gap"][1:])
rows = [[name, x[0], y[0], x[-1], y[-1]] for name, (x, y) in lines.items()]
print(
    text_table(
        ["learner", "words", "lacks", "words in the end", "lacks in the end"],
        rows,
        digits=3,
    )
)
assert all(y[-1] < 1e-3 for _, y in lines.values())

# %% [markdown]
# All four arrive, each in its manner. The table's policy gradient starts late and then beats them all: at $\pi^*$ the quantity
# $r - \lambda \log \pi/q$ is the same for all sentences, so its noise dies with its error. Planning often leads at first, and pays to the end for the
# one observation a count that it made up. In a world that answers, noise stays, and the order is another: see figure 5.

# %% mystnb={"image": {"alt": "Left: four learners approach the posterior's value. Middle: what five plans promise and earn in the dialogue. Right: the first action of the best policy turns from answering to asking as γ rises."}}
with plots.publication_style():
    figure, (learned, kept, patient) = plots.new_figure(3, 3.5, 3.0)
    plots.plot_lines(
        lines, learned, xlabel="words seen", ylabel="λ log Z − J(π)", log=True
    )
    learned.set(xscale="log", title="Four learners, one posterior", ylim=(1e-13, 10))
    names = list(plans.earned)
    for shift, label, values, colour in (
        (-0.2, "promised", plans.promised, plots.PRIOR_COLOUR),
        (0.2, "earned", plans.earned, plots.POSTERIOR_COLOUR),
    ):
        kept.barh(
            [k + shift for k in range(len(names))],
            [values[name] for name in names],
            0.4,
            label=label,
            color=colour,
        )
    kept.set_yticks(range(len(names)), names)
    kept.invert_yaxis()
    kept.axvline(
        plans.earned["optimal"],
        color=plots.BLACK,
        linewidth=0.8,
        linestyle=":",
        label="the most there is",
    )
    kept.set(
        xlabel="reward units",
        ylabel="planned with",
        title="What plans promise and earn",
    )
    kept.legend(loc="center right")
    plots.plot_lines(
        {name: (patience, shares) for name, shares in opening.items()},
        patient,
        xlabel="discount γ",
        ylabel="π*(action | vague)",
    )
    patient.set_title("Patience learns to ask")
plots.picture(figure, "runs/tutorials/t05")

# %% [markdown]
# ## What to remember
#
# - Values, soft Q-learning, planning and the policy gradient have one optimum, the posterior, if each keeps the soft value and the reward: a maximum or a
#   misplaced $\alpha$ ends elsewhere, and by how much is an exact number.
# - $\nabla J = -\lambda\,\nabla\mathrm{KL}(\pi\|\pi^*)$: climbing the objective is approaching the posterior, and one natural step of $1/\lambda$ is there.
# - Be soft over what you choose and take plain means over what the world does. The posterior over whole trajectories confuses the two: it equals the
#   optimum only where the world is deterministic.

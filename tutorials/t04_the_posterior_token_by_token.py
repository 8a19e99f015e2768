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
# # 4. Where is the posterior, token by token?
#
# Tutorial 3 found the best policy over *whole sentences*, $\pi^*(y) \propto q(y)\,e^{r(y)/\lambda}$. But a language model writes one
# token after another, and the reward comes at the end. **What should it do at the first token?** The answer is one number per prefix,
# the *soft value*; it is computed backwards from the end, and it turns the posterior into a language model.

# %%
import math

from klrl_edu import (
    RecurrentModel,
    conditional_log_probs,
    four_sentences,
    logspace,
    losses,
    plots,
    posterior,
    restrict_to_support,
    seeded_draw,
    soft_bellman,
    surnames,
    train,
)
from klrl_edu.core.display import text_table
from klrl_edu.exercises import check
from klrl_edu.learning.training import cosine
from klrl_edu.problems.examples import FOUR_REWARDS, FOUR_SENTENCES
from klrl_edu.reference import posterior as posterior_of

q, r = FOUR_SENTENCES, FOUR_REWARDS
lam = 1.0  # λ, in reward units per nat

# %% [markdown]
# ## The answer, by adding up
#
# On four sentences no theory is needed. The posterior of the first word is the sum over the sentences that start with it:

# %%
star, log_z = posterior_of(q, r, lam)
first = {
    word: sum(p for y, p in star.items() if y.startswith(word + " "))
    for word in ("the", "a")
}
prior_first = {
    word: sum(p for y, p in q.items() if y.startswith(word + " "))
    for word in ("the", "a")
}
print(
    text_table(
        ["first word", "prior", "posterior"],
        [[word, prior_first[word], first[word]] for word in first],
        digits=12,
    )
)

# %% [markdown]
# 'a' has become more likely: 'a dog' earns 2. But how does a model know that at the first word, before there is any dog? On 26 letters and
# twelve positions nobody can add up all sentences. So we ask what the sum *is*:
#
# $$\pi^*(a) = \sum_b \frac{q(a)\,q(b|a)\,e^{r(ab)/\lambda}}{Z} = \frac{q(a)}{Z} \sum_b q(b|a)\,e^{r(ab)/\lambda}.$$
#
# All that matters about the future is the last sum. Give its logarithm, in reward units, a name:
#
# $$V(a) = \lambda \log \sum_b q(b|a)\,e^{r(ab)/\lambda}, \qquad\text{so that}\qquad \pi^*(a) \propto q(a)\,e^{V(a)/\lambda}.$$
#
# **The first word is a posterior too**: prior $q(a)$, reward $V(a)$. $V$ is what a prefix is worth once it is continued in the best way.

# %% [markdown]
# ### Exercise 1: the soft value
#
# Write `soft_value(prior, values, lam)`: $\lambda \log \sum_a q(a)\,e^{Q(a)/\lambda}$ for dictionaries `prior` (next token -> q) and `values`
# (next token -> Q). It is tried on random tables.


# %% tags=["exercise"]
answer = ...  # def soft_value(prior, values, lam): ..., and then answer = soft_value
check("t04.value", answer)


# %% tags=["solution", "hide-cell"]
def soft_value(prior, values, lam):
    return lam * math.log(sum(prior[a] * math.exp(values[a] / lam) for a in prior))


answer = soft_value
check("t04.value", answer)
for each in (100.0, 1.0, 0.01):
    print(
        f"λ = {each:g}: the soft value of rewards 0 and 1 at even odds is"
        f" {soft_value({'x': 0.5, 'y': 0.5}, {'x': 0.0, 'y': 1.0}, each):.4f}"
    )
# From the mean (λ large) to the maximum (λ small): a maximum that hedges.

# %% [markdown]
# ## Backwards from the end
#
# With it, one sweep from the last word to the first:
#
# $$Q(s,a) = r(s,a) + V(sa), \qquad V(s) = \lambda \log \sum_a q(a|s)\,e^{Q(s,a)/\lambda}, \qquad
# \pi^*(a|s) = q(a|s)\,e^{(Q(s,a) - V(s))/\lambda}.$$
#
# This is Bellman's equation with a soft maximum. At the empty prefix it ends where tutorial 3 ended: $V(\varnothing) = \lambda \log Z$.

# %%
value = {}
for word in prior_first:
    after = {
        y: q[y] / prior_first[word] for y in q if y.startswith(word + " ")
    }  # q(second word | first)
    value[word] = lam * math.log(
        sum(p * math.exp(r[y] / lam) for y, p in after.items())
    )
root = lam * math.log(
    sum(prior_first[word] * math.exp(value[word] / lam) for word in value)
)
print(", ".join(f"V({word}) = {v:.12f}" for word, v in value.items()))
print(f"V(∅) = {root:.12f}, λ log Z = {lam * log_z:.12f}")
by_values = {
    word: prior_first[word] * math.exp((value[word] - root) / lam) for word in value
}
print(", ".join(f"π*({word}) = {p:.12f}" for word, p in by_values.items()))
assert abs(root - lam * log_z) < 1e-9
assert all(abs(by_values[word] - first[word]) < 1e-9 for word in first)

# %% [markdown]
# ### Exercise 2: another λ
#
# The values of the two first words at $\lambda = ½$, as a dictionary `{"the": ..., "a": ...}`.

# %% tags=["exercise"]
answer = ...
check("t04.prefixes", answer)

# %% tags=["solution", "hide-cell"]
answer = {}
for word in ("the", "a"):
    after = {y: q[y] / prior_first[word] for y in q if y.startswith(word + " ")}
    answer[word] = 0.5 * math.log(
        sum(p * math.exp(r[y] / 0.5) for y, p in after.items())
    )
check("t04.prefixes", answer)
# Both rose towards the best reward in reach, 1 after 'the' and 2 after 'a':
print(", ".join(f"V({word}) at λ = ½ is {v:.6f}" for word, v in answer.items()))

# %% [markdown]
# ### Exercise 3: the first word at λ = ½
#
# The posterior's first word at $\lambda = ½$, as a dictionary. Use the values of exercise 2.

# %% tags=["exercise"]
answer = ...
check("t04.first", answer)

# %% tags=["solution", "hide-cell"]
half = {}
for word in ("the", "a"):
    after = {y: q[y] / prior_first[word] for y in q if y.startswith(word + " ")}
    half[word] = 0.5 * math.log(sum(p * math.exp(r[y] / 0.5) for y, p in after.items()))
weight = {word: prior_first[word] * math.exp(half[word] / 0.5) for word in half}
answer = {word: w / sum(weight.values()) for word, w in weight.items()}
check("t04.first", answer)

# %% [markdown]
# ## Two shortcuts that are wrong
#
# It is tempting to look ahead less carefully: tilt the first word by the *mean* reward behind it, or by the *best* one. Both are limits of the
# soft value, and neither is the posterior:

# %%
rows = []
for name, look_ahead in {
    "mean reward under q": {
        w: sum(q[y] * r[y] for y in q if y.startswith(w + " ")) / prior_first[w]
        for w in value
    },
    "soft value V": value,
    "best reward": {w: max(r[y] for y in q if y.startswith(w + " ")) for w in value},
}.items():
    tilted = {w: prior_first[w] * math.exp(look_ahead[w] / lam) for w in value}
    rows.append(
        [name, look_ahead["the"], look_ahead["a"], tilted["a"] / sum(tilted.values())]
    )
print(text_table(["tilt by", "the", "a", "probability of 'a'"], rows, digits=6))

# %% [markdown]
# ### Exercise 4: the policy at a prefix
#
# Write `soft_policy(prior, values, lam)`: the distribution $q(a)\,e^{(Q(a) - V)/\lambda}$ as a dictionary. It is tried on random tables.


# %% tags=["exercise"]
answer = ...  # def soft_policy(prior, values, lam): ..., and then answer = soft_policy
check("t04.policy", answer)


# %% tags=["solution", "hide-cell"]
def soft_policy(prior, values, lam):
    v = lam * math.log(sum(prior[a] * math.exp(values[a] / lam) for a in prior))
    return {a: prior[a] * math.exp((values[a] - v) / lam) for a in prior}


answer = soft_policy
check("t04.policy", answer)

# %% [markdown]
# ## A name, letter by letter
#
# The same sweep on real text: US surnames spelled as letters, rewarded where they end in *-son*, *-sen* or *-man*. `soft_bellman` walks all
# prefixes at once. Watch the value of a prefix rise while *johnson* is spelled: each letter either keeps the ending in reach or gives it up.

# %%
names = posterior(surnames(kl_coef=0.25, count=500))
values = soft_bellman(names.enumerated(), 0.25)
tokens = names.problem.space.encode(["johnson"])
node, edge = values.trie.find(tokens)
length = len("johnson") + 1
prefix_values = values.state_values[node[0, :length]].tolist()
prior_steps, posterior_steps = (
    part[edge[0, :length]].exp().tolist()
    for part in (values.log_prior, values.log_policy)
)
letters = [*"johnson", "end"]
rows = [
    ["johnson"[:t] or "∅", v, letters[t], a, b]
    for t, (v, a, b) in enumerate(
        zip(prefix_values, prior_steps, posterior_steps, strict=True)
    )
]
print(
    text_table(["prefix", "V(prefix)", "next", "q(next)", "π*(next)"], rows, digits=4)
)
assert abs(prefix_values[0] - float(names.value)) < 1e-9

# %% [markdown]
# Where $V$ jumps the posterior leaves the prior: $\log \pi^*(a|s)/q(a|s) = (Q(s,a) - V(s))/\lambda$. Where it does not, the prior may write on.

# %% [markdown]
# ## An experiment: a network learns the values without seeing them
#
# An LSTM trained on whole-sentence rewards (`losses.rloo`) never computes a value. If it reaches $\pi^*$, its *conditionals* are those of the soft
# Bellman equation all the same. We measure each prefix on its own, by the chain rule of tutorial 1: the KL of a sentence is the KL at the first word, plus the mean
# KL at the second.

# %%
problem = four_sentences(kl_coef=lam)
target = posterior(problem)
network = restrict_to_support(
    RecurrentModel(problem.space, hidden_size=32, seed=0), problem.prior
)
lines = {"first word": ([], []), "after 'the'": ([], []), "after 'a'": ([], [])}
read = problem.space.encode(["the cat", "a cat"])


def look(step):
    mine, best = (
        conditional_log_probs(model, read).detach() for model in (network, target.model)
    )
    for name, (row, t) in {
        "first word": (0, 0),
        "after 'the'": (0, 1),
        "after 'a'": (1, 1),
    }.items():
        lines[name][0].append(step)
        lines[name][1].append(float(logspace.kl_divergence(mine[row, t], best[row, t])))


look(0)
draw = seeded_draw(0)
for block in range(20):  # 20 × 10 steps, so that we can look in between
    train(
        network,
        problem,
        losses.rloo,
        steps=10,
        batch_size=64,
        lr=1e-2 * cosine(block / 20),
        max_grad_norm=1.0,
        draw=draw,
    )
    look(10 * (block + 1))
print(
    text_table(
        ["where", "KL before", "KL after 200 steps"],
        [[name, y[0], y[-1]] for name, (_, y) in lines.items()],
        digits=3,
    )
)

# %% mystnb={"image": {"alt": "Left: the first word under the prior, three look-aheads and the posterior. Middle: the value of each prefix of johnson rises. Right: the LSTM's conditionals reach the posterior's."}}
with plots.publication_style():
    figure, (words, climb, learned) = plots.new_figure(3, 3.5, 3.0)
    shown = {
        "prior": prior_first["a"],
        "mean reward": None,
        "soft value": first["a"],
        "best reward": None,
    }
    for name, column in (("mean reward", 0.0), ("best reward", 1.0)):
        reach = {w: [r[y] for y in q if y.startswith(w + " ")] for w in value}
        means = {
            w: sum(q[y] * r[y] for y in q if y.startswith(w + " ")) / prior_first[w]
            for w in value
        }
        ahead = {w: max(reach[w]) if column else means[w] for w in value}
        tilted = {w: prior_first[w] * math.exp(ahead[w] / lam) for w in value}
        shown[name] = tilted["a"] / sum(tilted.values())
    colours = [
        plots.PRIOR_COLOUR,
        plots.ORANGE,
        plots.POSTERIOR_COLOUR,
        plots.VERMILION,
    ]
    words.bar(list(shown), list(shown.values()), color=colours)
    words.set(
        xlabel="tilted by",
        ylabel="probability of 'a' first",
        title="Only the soft value is right",
    )
    words.tick_params(axis="x", labelrotation=20)
    climb.plot(range(length), prefix_values, "o-", color=plots.POSTERIOR_COLOUR)
    climb.set_xticks(range(length), ["∅", *"johnson"])
    climb.set(
        xlabel="prefix up to this letter",
        ylabel="V(prefix) in reward units",
        title="A name's value while it is spelled",
    )
    plots.plot_lines(
        lines,
        learned,
        xlabel="training step",
        ylabel="KL(π‖π*) at this prefix",
        log=True,
    )
    learned.set_title("The LSTM finds it at every prefix")
plots.picture(figure, "runs/tutorials/t04")

# %% [markdown]
# ## What to remember
#
# - The posterior is a language model: $\pi^*(a|s) = q(a|s)\,e^{(Q(s,a) - V(s))/\lambda}$, a posterior at every prefix, with $V$ for the reward.
# - $V(s) = \lambda \log \mathrm{E}_q[e^{r/\lambda} \mid s]$ runs from the mean reward (large $\lambda$) to the best one in reach (small $\lambda$), and $V(\varnothing) = \lambda \log Z$.
# - The sweep costs one pass over prefixes. Tutorial 8 makes it fit where prefixes cannot be listed.

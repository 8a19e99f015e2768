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
# # 8. When is the posterior tractable?
#
# So far every sentence could be listed. A language model of letters has more spellings than there are seconds in the age of the universe,
# and still its posterior can be exact: **if what matters about the past fits into a few states**. This tutorial builds such a prior from
# real surnames, tilts it by a pattern, and reads exact answers off a space that nobody can list.

# %%
import math

import torch

from klrl_edu import (
    HiddenMarkovModel,
    NGramModel,
    Problem,
    SequenceSpace,
    automata,
    compare,
    losses,
    plots,
    posterior,
    regular_expression,
    seeded_draw,
    surnames,
    train,
)
from klrl_edu.core.display import text_table
from klrl_edu.exercises import check
from klrl_edu.exercises.t08 import AFTER, COUNTS, START
from klrl_edu.problems.corpora import surname_frequencies

# %% [markdown]
# ## Counting, and what was never counted
#
# The simplest language model counts. But a sentence that was not seen has count 0, and prior mass 0 is for ever: no reward can bring it back. A
# *Dirichlet* prior adds $\alpha$ to every count, and that is Bayes' rule too: the predictive probability of $y$ is $(n_y + \alpha)/(N + \alpha K)$.

# %% [markdown]
# ### Exercise 1: the predictive distribution
#
# Ten sentences were read, with the counts below. Give the predictive distribution for $\alpha = 1$, as a dictionary.

# %%
print(", ".join(f"{y}: {n}" for y, n in COUNTS.items()))

# %% tags=["exercise"]
answer = ...
check("t08.predictive", answer)

# %% tags=["solution", "hide-cell"]
total = sum(COUNTS.values()) + len(COUNTS)
answer = {y: (n + 1) / total for y, n in COUNTS.items()}
check("t08.predictive", answer)
print(", ".join(f"{y} {p:.6f}" for y, p in answer.items()))

# %% [markdown]
# ## A prior of letters
#
# An *n-gram* looks back $n - 1$ letters. We fit three of them to five thousand US surnames (each counted as often as it is borne), and a hidden Markov model
# with eight states. Which one finds the names least surprising?

# %%
names = surnames(count=1000)
space, table = names.space, surname_frequencies(1000)
people = [1e3 * percent for percent in table.values()]  # of 100,000
share = torch.tensor(people, dtype=torch.float64) / sum(people)
spelled = space.encode(list(table))
letters = float(share @ space.live(spelled).sum(-1).double())
models = {
    f"{n}-gram": NGramModel.fit(space, list(table), n, weights=people)
    for n in (1, 2, 3)
}
models["hidden Markov, 8 states"] = HiddenMarkovModel.fit(
    space, list(table), 8, weights=[float(p) for p in share], steps=20
).model
rows = []
for name, model in models.items():
    with torch.no_grad():
        rows.append(
            [
                name,
                len(model.emission_log_probs()),
                -float(share @ model.log_prob(spelled)) / letters,
            ]
        )
print(text_table(["prior", "states", "nats a letter"], rows, digits=4))
print(f"spellings in the space: {space.size:,}")

# %% [markdown]
# ## Two states are enough for a parity
#
# Now the reward. "Does the name hold an even number of e's?" looks like a question about whole names. Yet reading from left to right, one bit is enough:
# even so far, or odd so far. Whatever can be decided by reading with finitely many states is an **automaton**.
#
# Sums over texts then become sums over states. The probability that `length` independent letters, each an e with probability $p$, hold an even number of
# e's needs no list of texts: two numbers, updated once a letter.

# %% [markdown]
# ### Exercise 2: an even number
#
# Write `even(p, length)` with a loop over the letters. It is tried on random inputs.


# %% tags=["exercise"]
answer = ...  # def even(p, length): ..., and then answer = even
check("t08.even", answer)


# %% tags=["solution", "hide-cell"]
def even(p, length):
    is_even, is_odd = 1.0, 0.0
    for _ in range(length):
        is_even, is_odd = (1 - p) * is_even + p * is_odd, (1 - p) * is_odd + p * is_even
    return is_even


answer = even
check("t08.even", answer)
print(
    f"p = ¼, 30 letters: {even(0.25, 30):.12f}, in closed form"
    f" {(1 + (1 - 2 * 0.25) ** 30) / 2:.12f}"
)

# %% [markdown]
# ## Prior times automaton
#
# Put both together. The prior's state is its last letters $c$, the automaton's is $s$, and all that the future depends on is the pair:
#
# $$\beta_t(c,s) = q(\mathrm{end}|c)\,e^{f(s)/\lambda} + \sum_k q(k|c)\,e^{w(s,k)/\lambda}\,\beta_{t+1}(ck, \delta(s,k)), \qquad Z = \beta_0.$$
#
# This is tutorial 4's sweep, over pairs instead of prefixes. `regular_expression` builds the automaton of a pattern, and `posterior` takes *forward–backward* by
# itself when the space is too large to list. First on words of three letters, where we can check it by listing:

# %%
pattern = "(son|sen|man)$"
machine = regular_expression(pattern, space)
reward = automata.accept_reward(machine)
print(
    f"the automaton of /{pattern}/ has {len(machine)} states; the trigram has"
    f" {len(models['3-gram'].emission_log_probs())} contexts"
)
target = posterior(Problem(models["3-gram"], reward, 0.2))
print(target)
small = SequenceSpace(tuple("abcde"), 5, separator="")
tiny = Problem(
    NGramModel.fit(small, ["abe", "bab", "cab", "dad", "ada"], 2),
    automata.accept_reward(regular_expression("a.$", small)),
    0.2,
)
by_sum, by_list = posterior(tiny, "forward_backward"), posterior(tiny, "enumeration")
print(
    f"a check on {small.size:,} texts: {float(by_sum.log_evidence):.12f} by states,"
    f" {float(by_list.log_evidence):.12f} by listing"
)
assert abs(float(by_sum.log_evidence) - float(by_list.log_evidence)) < 1e-12

# %% [markdown]
# What does this posterior say? Its most probable spellings, exact samples from it (some of them are nobody's name), its mean reward and its distance from the prior:

# %%
model = target.model
top = model.top_sequences(5)
print(
    "most probable: "
    + ", ".join(
        f"{name} {p:.4f}"
        for name, p in zip(
            space.decode(top.tokens), top.log_weights.exp().tolist(), strict=True
        )
    )
)
print("samples: " + ", ".join(space.decode(model.sample(8, draw=seeded_draw(3)))))
mean, variance = model.reward_moments()
print(
    f"E[r] = {float(mean):.6f}, Var[r] = {float(variance):.6f}, KL(π*‖q) ="
    f" {float(model.kl_to_prior()):.6f} nats"
)
gap = float(mean) - 0.2 * float(model.kl_to_prior()) - float(target.value)
print(f"E[r] − λ KL(π*‖q) − λ log Z = {abs(gap):.0e}")
assert abs(gap) < 1e-12

# %% [markdown]
# ### Exercise 3: hearing a constraint early
#
# A hard constraint is a reward of $-\infty$. Take the bigram below on texts of exactly three words, given that *exactly one* of them is 'b'. What is the law
# of the **first** word, as a dictionary? (Three texts are left; weigh them.)

# %%
print(f"first: {START}; next: {AFTER}")

# %% tags=["exercise"]
answer = ...
check("t08.first", answer)

# %% tags=["solution", "hide-cell"]
left = {"baa": START["b"] * AFTER["b"]["a"] * AFTER["a"]["a"]}
left["aba"] = START["a"] * AFTER["a"]["b"] * AFTER["b"]["a"]
left["aab"] = START["a"] * AFTER["a"]["a"] * AFTER["a"]["b"]
answer = {
    word: sum(q for text, q in left.items() if text[0] == word) / sum(left.values())
    for word in "ab"
}
check("t08.first", answer)
print(", ".join(f"{word} {p:.6f}" for word, p in answer.items()))

# %% [markdown]
# ## An experiment: a policy of the same kind, judged exactly
#
# A trigram policy starts as a copy of the prior and is trained by RLOO on samples. The space cannot be listed, and still `compare` gives both divergences
# without sampling: policy, prior and automaton have finitely many states together, and the sum runs over those.

# %%
prior = models["3-gram"].requires_grad_(False)
problem = Problem(prior, reward, 0.2)
history = train(
    None,
    problem,
    losses.rloo,
    steps=120,
    batch_size=256,
    lr=0.1,
    draw=seeded_draw(0),
    target=target,
    evaluate_every=20,
)
policy = history.policy
final = compare(policy, target)
print(
    f"KL(π‖π*): {history['reverse_kl'][0]:.4f} nats at the start,"
    f" {final.reverse_kl:.4f} after 120 steps; E[r] {final.expected_reward:.4f}"
)
sampled = compare(policy, target, n=2000, draw=seeded_draw(1))
print(
    f"by 2,000 samples instead: {sampled.reverse_kl:.4f} ±"
    f" {sampled.standard_error['reverse_kl']:.4f}"
)

# %% [markdown]
# Why does it stop short? The posterior of a trigram under this pattern is *not* a trigram: near the end of a name it knows how many letters are left before
# the last position, and which part of the pattern is still owed. A policy of the prior's kind can only come near.

# %% mystnb={"image": {"alt": "Left: lengths of names under prior and posterior. Middle: the trigram policy's KL falls and levels off. Right: mean reward along the KL from the prior, for all λ."}}
with plots.publication_style():
    figure, (lengths, curve, frontier) = plots.new_figure(3, 3.5, 3.0)
    before = posterior(Problem(prior, reward, math.inf)).model
    for name, side, colour in (
        ("prior", before, plots.PRIOR_COLOUR),
        ("posterior", model, plots.POSTERIOR_COLOUR),
    ):
        lengths.plot(
            side.length_law().tolist(), "o-", color=colour, markersize=3, label=name
        )
    lengths.set(
        xlabel="letters", ylabel="probability", title="The pattern lengthens names"
    )
    lengths.legend()
    plots.plot_runs(
        {"trigram policy": history}, ax=curve, ylabel="KL(π‖π*) in nats, exact"
    )
    curve.set_title("Near, and not on it")
    points = []
    for each in (2.0, 0.5, 0.3, 0.2, 0.15, 0.1):
        star = posterior(Problem(prior, reward, each)).model
        points.append((float(star.kl_to_prior()), float(star.reward_moments()[0])))
    lines = {
        "π* of every λ": tuple(zip(*points, strict=True)),
        "trigram policy": (history["kl_to_prior"], history["expected_reward"]),
    }
    plots.plot_lines(lines, frontier, xlabel="KL(·‖q) in nats", ylabel="E[r]")
    frontier.set_title("Below the frontier")
    frontier.legend(loc="lower right")
plots.picture(figure, "runs/tutorials/t08")

# %% [markdown]
# ## What to remember
#
# - Exactness needs few *states*, not few sequences: n-gram or hidden Markov prior, times an automaton, gives $Z$, conditionals, samples, moments and best
#   sequences in time linear in the length.
# - Patterns, word lists, counts, parities and lengths are automata; products and complements of them too. A reward that looks at everything at once is not.
# - The posterior of an n-gram under a pattern is usually no n-gram: a policy of the prior's kind has a gap, and here the gap is an exact number.

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
# # 1. What does KL measure?
#
# A language model is a probability distribution over texts. When we train one, we want to know how far it has moved from
# where it started, and "far" needs a number. The number that everybody uses is the Kullback–Leibler divergence. This
# tutorial asks one question: **what does that number measure?**
#
# You need Python, and to have seen a sum. Everything happens on four sentences, so that every number is exact and you can
# check it by hand. Exercises check themselves: put your answer in place of the dots, run the cell, and read what it says.

# %%
import inspect
import math

import torch
from torch.nn.functional import logsigmoid

from klrl_edu import plots, reference
from klrl_edu.core import logspace
from klrl_edu.core.display import text_table
from klrl_edu.exercises import check
from klrl_edu.exercises.t01 import CORRELATED
from klrl_edu.reference import chain_rule, entropy, expectation, kl, next_token

# %% [markdown]
# ## Four sentences
#
# The whole language consists of four sentences. A first model $q$ gives them these probabilities; a second one, $\pi$, has
# moved a little. In this course $q$ is always the *prior*, the model before training, and $\pi$ the *policy*, the model
# that we train.

# %%
q = {"the cat": 0.4, "the dog": 0.3, "a cat": 0.2, "a dog": 0.1}
pi = {"the cat": 0.5, "the dog": 0.2, "a cat": 0.1, "a dog": 0.2}

# %% [markdown]
# ## Three functions, in full
#
# `klrl_edu/reference.py` holds the theory of this whole course in plain dictionaries. Here are the three functions that this
# tutorial needs, printed from the file itself: there is nothing else behind them.
#
# $$\mathrm{E}_p[f] = \sum_y p(y)\,f(y), \qquad H(p) = \mathrm{E}_p[-\log p], \qquad
# \mathrm{KL}(p\,\|\,q) = \mathrm{E}_p\!\left[\log \tfrac{p}{q}\right]$$

# %%
for function in (expectation, entropy, kl):
    print(inspect.getsource(function))

# %% [markdown]
# ## Evidence, one sentence at a time
#
# Suppose that somebody shows you a sentence $y$, and you must say whether $\pi$ or $q$ wrote it. The evidence is the
# log-ratio $u(y) = \log \pi(y)/q(y)$: positive where $\pi$ is more likely to write $y$, negative where $q$ is. Independent
# sentences add their evidence. So KL is the **mean evidence per sentence, when $\pi$ is the one who writes**:
#
# $$\mathrm{KL}(\pi\,\|\,q) = \sum_y \pi(y)\, u(y)$$

# %%
u = {y: math.log(pi[y] / q[y]) for y in q}
rows = [[y, q[y], pi[y], u[y], pi[y] * u[y]] for y in q]
print(
    text_table(
        ["sentence", "prior q", "policy π", "u = log π/q", "π·u"], rows, digits=6
    )
)
print(f"\nsum of π·u = {sum(pi[y] * u[y] for y in q):.12f} nats")
print(f"kl(pi, q)  = {kl(pi, q):.12f} nats")

# %% [markdown]
# Single terms are negative; the sum never is, and it is 0 only if the two distributions are the same. (Why? $\log x \le x - 1$,
# so $-\mathrm{KL}(\pi\|q) = \mathrm{E}_\pi[\log q/\pi] \le \mathrm{E}_\pi[q/\pi - 1] = 0$.)
#
# With the natural logarithm the unit is the *nat*; with the logarithm to base 2 it is the *bit*. The article that these four
# sentences come from, 《大语言模型原理基础与前沿 带有KL惩罚的强化学习：贝叶斯推理观点》 ([article C](theory.md#what-five-articles-claim)),
# prints $D_{\mathrm{KL}} \approx 0.22$ for this pair. Let us see whether that is one or the other.

# %%
article = 0.22
for value, unit in ((kl(pi, q), "nats"), (kl(pi, q) / math.log(2), "bits")):
    print(
        f"KL(π‖q) = {value:.4f} {unit}; the article's {article} is"
        f" {article / value:.2f} times that"
    )
nearest = min(u, key=lambda y: abs(u[y] - article))
print(
    f"the one number in the table near {article} is u of {nearest!r}, {u[nearest]:.4f}"
)

# %% [markdown]
# It is neither. Perhaps the mean was never taken: the evidence of a single sentence is not a divergence. A printed number can be wrong; one that
# you recompute does not stay wrong for long.
#
# ### Exercise 1: your own KL
#
# Write `my_kl(p, q)` for dictionaries, without using `reference.kl`. Mind two cases: an outcome that $p$ never gives counts
# nothing; an outcome that $p$ gives and $q$ never does makes the answer `math.inf` (seeing it once is *proof*). It will be
# tried on random tables.


# %% tags=["exercise"]
answer = ...  # def my_kl(p, q): ..., and then answer = my_kl
check("t01.kl", answer)


# %% tags=["solution", "hide-cell"]
def my_kl(p, q):
    total = 0.0
    for y in p:
        if p[y] == 0:
            continue  # 0 · log 0 is 0: what never happens brings no evidence
        if q.get(y, 0) == 0:
            return math.inf
        total += p[y] * math.log(p[y] / q[y])
    return total


answer = my_kl
check("t01.kl", answer)

# %% [markdown]
# ## It has a direction
#
# If $q$ writes, the mean is taken under $q$, and the number is another one. KL is not a distance: the order of its arguments
# matters. With the model that we train in front it is called *reverse*, with the model that we train behind *forward*.

# %%
print(f"reverse  KL(π‖q) = {kl(pi, q):.12f} nats")
print(f"forward  KL(q‖π) = {kl(q, pi):.12f} nats")

# %% [markdown]
# There is a second way to read it. A code that is built for $q$ spends $-\log q(y)$ nats on the sentence $y$. If $\pi$ writes,
# it spends the *cross-entropy* $\mathrm{E}_\pi[-\log q]$ on average; the best code for $\pi$ would spend $H(\pi)$. The
# difference is what the wrong model costs:
#
# $$\mathrm{KL}(\pi\,\|\,q) = \mathrm{E}_\pi[-\log q] - H(\pi)$$

# %%
cross_entropy = expectation(pi, lambda y: -math.log(q[y]))
print(f"entropy of q: {entropy(q):.12f} nats, of π: {entropy(pi):.12f} nats")
print(
    f"cross-entropy − entropy = {cross_entropy:.12f} − {entropy(pi):.12f} ="
    f" {cross_entropy - entropy(pi):.12f} nats"
)
assert abs(cross_entropy - entropy(pi) - kl(pi, q)) < 1e-9

# %% [markdown]
# ## Token by token
#
# Language models write one token after another, $p(y) = p(y_1)\,p(y_2\,|\,y_1)$, and the logarithm turns the product into a
# sum. So KL is a sum over positions too: the **chain rule**
#
# $$\mathrm{KL}(p\,\|\,q) = \mathrm{KL}\big(p(y_1)\,\|\,q(y_1)\big) +
# \mathrm{E}_{y_1 \sim p}\Big[\mathrm{KL}\big(p(y_2|y_1)\,\|\,q(y_2|y_1)\big)\Big]$$
#
# Note who chooses the first word in the second term: $p$ does. `reference.py` reads a sentence token by token when it is a
# tuple of words.


# %%
def words(p):
    """'the cat' -> ('the', 'cat')."""
    return {tuple(y.split()): probability for y, probability in p.items()}


print(inspect.getsource(chain_rule))
terms = chain_rule(words(pi), words(q), 2)
print(
    f"first word {terms[0]:.12f} + second word {terms[1]:.12f} = {sum(terms):.12f} nats"
)

# %% [markdown]
# The first word has not changed at all: both models say "the" with probability 0.7. All of the change is in which noun
# follows.
#
# Another article, on Transformers with a KL penalty ([article B](theory.md#what-five-articles-claim)), adds up one KL per position
# and leaves out the prefix, $\sum_i \mathrm{KL}(P(y_i)\,\|\,Q(y_i))$. Does that give the same?


# %%
def marginal(p, position):
    """The distribution of the word at one position, whatever stands before or after."""
    found = {}
    for y, probability in words(p).items():
        found[y[position]] = found.get(y[position], 0.0) + probability
    return found


per_position = [kl(marginal(pi, i), marginal(q, i)) for i in range(2)]
print(
    f"without prefixes: {abs(per_position[0]):.3f} + {abs(per_position[1]):.3f} nats;"
    f" with prefixes: {kl(pi, q):.3f} nats"
)

# %% [markdown]
# It sees nothing. Both models say "the" 70 % and "cat" 60 % of the time; only the *combinations* differ, and a sum without
# prefixes is blind to those.
#
# ### Exercise 2: the chain rule
#
# A third model, `CORRELATED`, writes almost only "the cat" and "a dog". Compute the two terms of KL(`CORRELATED`‖$q$) as a
# list of two numbers, in nats. `marginal(p, 0)` gives the distribution of the first word; `next_token(words(p), ("the",))`
# gives that of the second word after "the". Do not call `chain_rule`: build it.

# %% tags=["exercise"]
print(
    text_table(
        ["sentence", "prior q", "CORRELATED"], [[y, q[y], CORRELATED[y]] for y in q]
    )
)
answer = ...  # [first term, second term]
check("t01.chain", answer)

# %% tags=["solution", "hide-cell"]
first_words = marginal(CORRELATED, 0)
first_term = kl(first_words, marginal(q, 0))
second_term = sum(
    first_words[a]
    * kl(
        next_token(words(CORRELATED), (a,)), next_token(words(q), (a,))
    )  # CORRELATED chooses the first word
    for a in ("the", "a")
)
answer = [first_term, second_term]
check("t01.chain", answer)
print(
    f"{first_term:.12f} + {second_term:.12f} = {first_term + second_term:.12f} ="
    " KL(CORRELATED‖q) nats"
)

# %% [markdown]
# ## How much do the words know of each other?
#
# Take $q$, and draw both words independently from its two marginals. The KL between $q$ and that product is the **mutual
# information** of the words: the evidence, per sentence, that the words belong together.
#
# $$I(Y_1; Y_2) = \mathrm{KL}\big(q(y_1, y_2)\,\big\|\,q(y_1)\,q(y_2)\big) = H(Y_1) + H(Y_2) - H(Y_1, Y_2)$$
#
# ### Exercise 3: mutual information
#
# Compute $I(Y_1; Y_2)$ of $q$ in nats.

# %% tags=["exercise"]
answer = ...
check("t01.mutual", answer)

# %% tags=["solution", "hide-cell"]
product = {
    f"{a} {b}": marginal(q, 0)[a] * marginal(q, 1)[b]
    for a in ("the", "a")
    for b in ("cat", "dog")
}
answer = kl(q, product)
check("t01.mutual", answer)
print(f"I(Y₁;Y₂) = {answer:.12f} nats")
# Entropies give the same, and are a good way to check a KL:
print(
    "H(Y₁) + H(Y₂) − H(Y₁,Y₂) ="
    f" {entropy(marginal(q, 0)) + entropy(marginal(q, 1)) - entropy(q):.12f} nats"
)

# %% [markdown]
# ## An experiment: two directions, two fits
#
# When a model is too small to match its target, which direction of KL we minimise decides *how* it fails. Our target is
# `CORRELATED`. Our model $\pi_\theta$ is as small as a language model gets: it cannot see its own first word when it writes
# the second. It has two parameters, the logits of "the" and of "cat".
#
# We train it twice from the same start, by plain gradient descent, once on the forward KL$(p\|\pi_\theta)$, which is what
# maximum likelihood does, and once on the reverse KL$(\pi_\theta\|p)$, which is what reinforcement learning does, as tutorial 3
# will show.


# %%
def log_prob(theta):
    """log π_θ of the four sentences: log π(first word) + log π(second word)."""
    the, cat = theta
    return torch.stack(
        [logsigmoid(a) + logsigmoid(b) for a in (the, -the) for b in (cat, -cat)]
    )


log_p = torch.tensor(list(CORRELATED.values()), dtype=torch.float64).log()
directions = {
    "forward, KL(p‖π)": lambda log_pi: logspace.kl_divergence(log_p, log_pi),
    "reverse, KL(π‖p)": lambda log_pi: logspace.kl_divergence(log_pi, log_p),
}
fits, curves = {}, {}
for name, divergence in directions.items():
    theta = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    curves[name] = []
    for _ in range(200):
        loss = divergence(log_prob(theta))
        (gradient,) = torch.autograd.grad(loss, theta)
        with torch.no_grad():
            theta -= 1.0 * gradient
        curves[name].append(loss.item())
    fits[name] = dict(zip(CORRELATED, log_prob(theta).exp().tolist(), strict=True))

rows = [[y, CORRELATED[y], *(fit[y] for fit in fits.values())] for y in CORRELATED]
print(
    text_table(
        ["sentence", "target p", *(f"fit by {name}" for name in fits)], rows, digits=4
    )
)
print()
for name, fit in fits.items():
    print(
        f"fit by {name}: forward {kl(CORRELATED, fit):.6f}, reverse"
        f" {kl(fit, CORRELATED):.6f} nats"
    )

# %% [markdown]
# The forward fit **covers**: it must not give a small probability to anything that the target writes, so it spreads, and writes
# "the dog" far too often. The reverse fit **seeks a mode**: it must not write what the target does not, so it settles on "the cat"
# and forgets "a dog". Each wins in its own direction. KL makes a model more compact, says [article B](theory.md#what-five-articles-claim);
# it depends on which KL.

# %% mystnb={"image": {"alt": "Left: the forward fit spreads over four sentences, the reverse fit picks one. Right: both KLs fall."}}
with plots.publication_style():
    figure, (bars, lines) = plots.new_figure(2, 3.8, 2.9)
    shown = {
        "target p": CORRELATED,
        **{f"fit by {name}": fit for name, fit in fits.items()},
    }
    for index, (label, table) in enumerate(shown.items()):
        colour = (plots.PRIOR_COLOUR, *plots.POLICY_COLOURS)[index]
        bars.bar(
            [place + (index - 1) * 0.27 for place in range(4)],
            list(table.values()),
            0.27,
            label=label,
            color=colour,
        )
    bars.set_xticks(range(4), list(CORRELATED))
    bars.set(
        ylabel="probability", title="One covers, the other seeks a mode", ylim=(0, 1.25)
    )
    bars.legend(loc="upper right")
    steps = range(len(curves["forward, KL(p‖π)"]))
    plots.plot_lines(
        {name: (steps, curve) for name, curve in curves.items()},
        lines,
        xlabel="training step",
        ylabel="the KL minimised, in nats",
    )
    lines.set(title="Two parameters learn two things", xlim=(0, 100))
plots.picture(figure, "runs/tutorials/t01")

# %% [markdown]
# ### Exercise 4: the forward fit, exactly
#
# The forward fit needs no training: it can be written down. Which distribution over the four sentences, with independent words,
# minimises KL(`CORRELATED`‖$\pi$)? Answer with a dictionary.

# %% tags=["exercise"]
answer = ...  # {"the cat": ..., "the dog": ..., "a cat": ..., "a dog": ...}
check("t01.product", answer)

# %% tags=["solution", "hide-cell"]
# KL(p‖π) = −H(p) − E_p[log π₁(Y₁)] − E_p[log π₂(Y₂)]: two separate maximum-likelihood fits, each solved by the marginal.
answer = {
    f"{a} {b}": marginal(CORRELATED, 0)[a] * marginal(CORRELATED, 1)[b]
    for a in ("the", "a")
    for b in ("cat", "dog")
}
check("t01.product", answer)
fit = fits["forward, KL(p‖π)"]
print(
    "the trained fit differs from it by at most"
    f" {max(abs(fit[y] - answer[y]) for y in fit):.1e}"
)
# What is left is what independent words cannot know: the mutual information of p.
print(
    f"KL(p‖fit) = {kl(CORRELATED, fit):.12f} nats = I(Y₁;Y₂) of p ="
    f" {kl(CORRELATED, answer):.12f} nats"
)

# %% [markdown]
# ## What to remember
#
# - KL$(\pi\|q)$ is the mean evidence per sentence, in nats, that a text comes from $\pi$ and not from $q$, when $\pi$ writes.
# - It has a direction. Forward covers, reverse seeks modes.
# - Over tokens it adds up, if the prefixes are drawn from the first argument; without prefixes it can miss everything.
#
# Every number here was exact, because we could list all sentences; `reference.py` is short enough to read to the end:

# %%
print(f"reference.py: {len(inspect.getsource(reference).splitlines())} lines")

"""Every figure of the registry: what is committed is what its script computes, and what it shows
holds.
"""

import dataclasses
import functools
import itertools
import json
import math
import statistics

import numpy as np
import pytest
import torch

import klrl_edu as klrl
from klrl_edu import reference
from klrl_edu.experiments import figures
from klrl_edu.problems.examples import FOUR_REWARDS, FOUR_SENTENCES

ENTRIES = {entry.number: entry for entry in figures.find_figures()}


@functools.cache
def committed(number):
    return json.loads(ENTRIES[number].data.read_text(encoding="utf-8"))


def assert_close(found, wanted, where="data"):
    if isinstance(wanted, dict):
        assert list(found) == list(wanted), where
        for key in wanted:
            assert_close(found[key], wanted[key], f"{where}.{key}")
    elif isinstance(wanted, list):
        assert len(found) == len(wanted), where
        for index, (one, other) in enumerate(zip(found, wanted, strict=True)):
            assert_close(one, other, f"{where}[{index}]")
    elif isinstance(wanted, float):
        assert found == pytest.approx(wanted, rel=1e-9, abs=1e-9), where
    else:
        assert found == wanted, where


@pytest.mark.parametrize("number", ENTRIES)
def test_the_committed_data_are_what_the_script_computes(number):
    module = figures.load_module(ENTRIES[number].script)
    assert_close(json.loads(figures.data_bytes(module.compute(module.Config()))), committed(number))


@pytest.mark.parametrize("number", ENTRIES)
def test_the_picture_is_drawn_from_the_committed_data_and_lies_beside_the_script(number):
    script = ENTRIES[number].script
    picture = figures.load_module(script).draw(committed(number))
    assert all(
        ax.get_xlabel() and ax.get_ylabel() and ax.get_title(loc="left") for ax in picture.axes
    )
    assert all(script.with_suffix(suffix).stat().st_size > 10_000 for suffix in (".png", ".pdf"))


@pytest.mark.parametrize("number", ENTRIES)
def test_the_config_is_frozen_and_the_docstring_names_source_and_every_datum(number):
    module = figures.load_module(ENTRIES[number].script)
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(module.Config(), dataclasses.fields(module.Config)[0].name, 1)
    assert ENTRIES[number].source
    first_column = [
        line.strip().split("  ")[0] for line in module.__doc__.partition("\nData")[2].splitlines()
    ]
    assert set(committed(number)) <= {
        name.strip() for names in first_column for name in names.split(",")
    }


def test_the_table_of_the_folder_is_the_registry():
    assert (figures.figures_folder() / "README.md").read_text(
        encoding="utf-8"
    ) == figures.registry_table()


# 01


def test_01_is_the_posterior_of_plain_dictionaries():
    data = committed("01")
    for kl_coef, row in zip(data["kl_coef"], data["posterior"], strict=True):
        star, _ = reference.posterior(FOUR_SENTENCES, FOUR_REWARDS, kl_coef)
        assert dict(zip(data["sentences"], row, strict=True)) == pytest.approx(star, abs=1e-12)


def test_01_runs_from_the_argmax_to_the_prior():
    data = committed("01")
    assert data["at_zero"] == {
        "probabilities": [0, 0, 0, 1],
        "expected_reward": 2,
        "kl_to_prior": pytest.approx(math.log(10), abs=1e-12),
    }
    assert data["at_infinity"]["probabilities"] == pytest.approx([0.4, 0.3, 0.2, 0.1], abs=1e-12)
    assert data["at_infinity"]["kl_to_prior"] == pytest.approx(0, abs=1e-12)
    assert data["prior_variance"] == pytest.approx(0.44, abs=1e-12)
    for name in ("expected_reward", "kl_to_prior"):
        assert all(a > b for a, b in itertools.pairwise(data[name]))
        assert data["at_infinity"][name] < data[name][-1]
        assert data[name][0] < data["at_zero"][name] + 1e-7
    last = data["kl_coef"][-1]
    assert data["expected_reward"][-1] - 0.6 == pytest.approx(0.44 / last, rel=0.05)
    assert data["kl_to_prior"][-1] == pytest.approx(0.44 / (2 * last**2), rel=0.1)


# 02


def frontier_value(kl_coef):
    """λ log Z of the surnames under their score, in plain dictionaries."""
    problem = figures.load_module(ENTRIES["02"].script).surnames_by_score(100)
    support = klrl.problem_support(problem)
    names = problem.space.decode(support.tokens)
    q, r = (
        dict(zip(names, support.log_prior.exp().tolist(), strict=True)),
        dict(zip(names, support.rewards.tolist(), strict=True)),
    )
    return kl_coef * reference.posterior(q, r, kl_coef)[1]


def test_02_nothing_lies_above_the_frontier():
    data = committed("02")
    shortfalls = [value for run in data["runs"] for value in run["shortfall"]]
    assert min(shortfalls) >= -1e-12
    assert (data["smallest_shortfall"], data["largest_shortfall"]) == (
        min(shortfalls),
        max(shortfalls),
    )


@pytest.mark.parametrize("kl_coef", [0.1, 0.25, 1.0, 4.0])
def test_02_every_run_is_below_every_tangent(kl_coef):
    value = frontier_value(kl_coef)
    points = [
        point
        for run in committed("02")["runs"]
        for point in zip(run["kl_to_prior"], run["expected_reward"], strict=True)
    ]
    assert len(points) == 4 * 31
    assert all(reward <= value + kl_coef * kl + 1e-12 for kl, reward in points)


def test_02_the_slope_of_the_frontier_is_lambda():
    frontier = committed("02")["frontier"]
    lam, kl, reward = frontier["kl_coef"], frontier["kl_to_prior"], frontier["expected_reward"]
    for i in range(1, len(lam) - 1):
        slope = (reward[i + 1] - reward[i - 1]) / (kl[i + 1] - kl[i - 1])
        assert lam[i + 1] < slope < lam[i - 1]  # concave: a chord's slope is that of a point inside
        assert slope == pytest.approx(lam[i], rel=0.02)


def test_02_runs_start_at_the_prior_and_approach_their_posterior_or_leave_the_frontier():
    data = committed("02")
    for run, tangent in zip(data["runs"], data["tangents"], strict=False):
        assert run["kl_to_prior"][0] == pytest.approx(0, abs=1e-12)
        assert run["kl_to_prior"][-1] == pytest.approx(tangent["kl_to_prior"], rel=0.1)
        assert run["shortfall"][-1] < 0.3 * max(run["shortfall"])
    assert data["runs"][-1]["kl_coef"] == 0
    assert data["runs"][-1]["shortfall"][-1] == data["largest_shortfall"] > 0.5


def test_02_the_height_of_the_frontier_is_its_reward_at_its_own_kl():
    module = figures.load_module(ENTRIES["02"].script)
    point = module._frontier_point(klrl.problem_support(module.surnames_by_score(100)))
    height = module._frontier_height(point)
    for kl_coef in (0.05, 0.3, 2.0, 50.0, math.inf):
        assert height(point(kl_coef)["kl_to_prior"]) == pytest.approx(
            point(kl_coef)["expected_reward"], abs=1e-12
        )
    assert height(100.0) == pytest.approx(2.7, abs=1e-12)


# 03


def test_03_stays_below_the_formula_and_ends_on_the_best_levels_mass():
    data = committed("03")
    for prior in data["priors"]:
        assert all(
            kl <= bound + 1e-12 for kl, bound in zip(prior["kl"], data["bound"], strict=True)
        )
        assert prior["kl"][-1] == pytest.approx(prior["limit"], abs=1e-9)
        assert data["bound"][-1] > prior["limit"] + 2
    for prior in data["priors"][1:]:  # uniform over L: within 0.04 nats of log L at n ≈ 5L
        size = round(math.exp(prior["limit"]))
        near = next(k for k, n in enumerate(data["n"]) if n >= 5 * size)
        assert prior["kl"][near] == pytest.approx(math.log(size), abs=0.04)


def test_03_best_of_n_never_lies_above_the_frontier():
    data = committed("03")
    log_q, rewards = (
        torch.tensor(data["problem"][name], dtype=torch.float64)
        for name in ("log_prior", "rewards")
    )
    for kl, reward in list(
        zip(data["best_of_n"]["kl"], data["best_of_n"]["expected_reward"], strict=True)
    )[1:-8]:  # inside the range of KL
        most = klrl.budget.frontier(
            log_q, rewards, [klrl.budget.kl_coef_for_budget(log_q, rewards, kl)]
        ).expected_reward
        assert reward <= float(most) + 1e-12


# 04


def test_04_optima_are_distributions_on_their_curves_and_only_chi_squared_has_zeros():
    data = committed("04")
    assert {side["name"]: bool(side["zeros"]) for side in data["optima"]} == {
        side["name"]: side["name"] == "χ²" for side in data["optima"]
    }
    for side in data["optima"]:
        assert sum(side["probabilities"]) == pytest.approx(1, abs=1e-12)
        ends = [side["probabilities"][k] / data["prior"][k] for k in (0, -1)]
        assert [data["curves"][side["name"]][k] for k in (0, -1)] == pytest.approx(
            ends, rel=1e-6, abs=1e-9
        )


def test_04_none_beats_the_posterior_at_its_own_objective():
    data = committed("04")
    q, r = (torch.tensor(data[name], dtype=torch.float64) for name in ("prior", "rewards"))

    def objective(p):
        p = torch.tensor(p, dtype=torch.float64)
        return float(p @ r - data["kl_coef"] * torch.xlogy(p, p / q).sum())

    values = {side["name"]: objective(side["probabilities"]) for side in data["optima"]}
    assert max(values, key=values.get) == "reverse KL"


# 05


def clearing_by_hand(points):
    """Figure 05's process in plain dictionaries: state -> action -> (prior, reward, {reply:
    probability}).
    """
    process = {
        k: {
            "ask": (0.75, -0.02, {k - 1: 0.7, k: 0.22, "annoyed": 0.08}),
            "answer": (0.25, 0.3, {"over": 1.0}),
        }
        for k in range(points, 0, -1)
    }
    process[0] = {
        "ask": (0.2, -0.02, {0: 0.8, "annoyed": 0.2}),
        "answer": (0.8, 2.0, {"over": 1.0}),
    }
    process["annoyed"] = {
        "ask": (0.5, -0.2, {"annoyed": 0.5, "over": 0.5}),
        "answer": (0.5, -0.1, {"over": 1.0}),
    }
    return process


def start_value(process, start, gamma, summary):
    """The value of `start` after enough sweeps of V(s) = summary of (q, r + γ Σ P V) over
    actions.
    """
    value = dict.fromkeys([*process, "over"], 0.0)
    for _ in range(600):
        for state, choices in process.items():
            value[state] = summary(
                [
                    (q, r + gamma * sum(p * value[after] for after, p in replies.items()))
                    for q, r, replies in choices.values()
                ]
            )
    return value[start]


def learners_of_05():
    return {learner["name"]: learner for learner in committed("05")["learners"]}


def medians_of_05(name):
    """transitions -> gap, medians over the seeds."""
    columns = (zip(*learners_of_05()[name][key], strict=True) for key in ("transitions", "gaps"))
    return {statistics.median(n): statistics.median(gap) for n, gap in zip(*columns, strict=True)}


def first_below(name, gap):
    return next(n for n, found in medians_of_05(name).items() if found < gap)


def test_05_the_line_is_the_optimum_and_the_prior_s_value_stands_below():
    data, process = committed("05"), clearing_by_hand(6)
    best = start_value(
        process,
        6,
        0.95,
        lambda row: 0.1 * math.log(math.fsum(q * math.exp(value / 0.1) for q, value in row)),
    )
    assert data["value"] == pytest.approx(best, abs=1e-12)
    assert data["prior_value"] == pytest.approx(
        start_value(process, 6, 0.95, lambda row: math.fsum(q * v for q, v in row)), abs=1e-12
    )
    assert (
        start_value(process, 6, 0.95, lambda row: max(v for _, v in row))
        > best
        > data["prior_value"] + 0.18
    )  # a wrong sum is another number


def test_05_gaps_are_never_negative_and_no_plan_exceeds_its_bound():
    learners = learners_of_05()
    assert all(
        0 <= gap < 1 for learner in learners.values() for row in learner["gaps"] for gap in row
    )
    planning = learners["planning on the estimated model"]
    pairs = [
        pair
        for rows in zip(planning["gaps"], planning["bounds"], strict=True)
        for pair in zip(*rows, strict=True)
    ]
    assert len(pairs) == 5 * 11
    assert all(gap <= bound for gap, bound in pairs)
    assert all(row[-1] < 0.25 * row[0] for row in planning["bounds"])


def test_05_every_route_arrives():
    for name, fraction in (
        ("planning on the estimated model", 1e-3),
        ("soft Q-learning", 2e-3),
        ("policy gradient", 2e-2),
    ):
        gaps = list(medians_of_05(name).values())
        assert gaps[-1] < fraction * gaps[0], name


def test_05_planning_comes_first_then_q_learning_on_the_same_episodes_then_the_policy_gradient():
    learners = learners_of_05()
    planning, q_learning = (
        learners[name] for name in ("planning on the estimated model", "soft Q-learning")
    )
    assert planning["transitions"] == q_learning["transitions"]
    small = 0.01
    assert 10 * first_below("planning on the estimated model", small) < first_below(
        "soft Q-learning", small
    )
    assert first_below("soft Q-learning", small) < first_below("policy gradient", small)
    plan, learned = (
        medians_of_05("planning on the estimated model"),
        medians_of_05("soft Q-learning"),
    )
    assert [n for n in plan if plan[n] > learned[n]] == [
        n for n in plan if n < 100
    ]  # a handful of episodes is no model
    assert all(
        committed("05")["value"] - plan[n] < committed("05")["prior_value"] for n in plan if n < 100
    )


# 06


def gaussian_moments(kl, function):
    """Mean and variance of a function of u = log π/q for N(0, 1) and N(√(2d), 1), by Gauss–Hermite
    quadrature.
    """
    nodes, weights = np.polynomial.hermite_e.hermegauss(150)
    shift = math.sqrt(2 * kl)
    values = function(kl - shift * nodes)
    mean = weights @ values / weights.sum()
    return mean, weights @ (values - mean) ** 2 / weights.sum()


def test_06_is_what_quadrature_finds():
    data = committed("06")
    functions = {"k1": lambda u: u, "k2": lambda u: u**2 / 2, "k3": lambda u: np.expm1(-u) + u}
    for k, kl in enumerate(data["kl"]):
        for name, function in functions.items():
            mean, variance = gaussian_moments(kl, function)
            assert data["relative_std"][name][k] == pytest.approx(
                math.sqrt(variance) / kl, rel=1e-7
            )
            assert data["relative_bias"][name][k] == pytest.approx(mean / kl - 1, abs=1e-9)


def test_06_the_best_control_variate_is_where_a_search_over_c_ends():
    data = committed("06")
    for k in range(0, len(data["kl"]), 8):
        kl = data["kl"][k]
        noise = [
            math.sqrt(gaussian_moments(kl, lambda u, c=c / 200: u + c * np.expm1(-u))[1]) / kl
            for c in range(201)
        ]
        best = data["relative_std"]["best"][k]
        assert best <= min(noise) * (1 + 1e-9)
        assert min(noise) == pytest.approx(best, rel=2e-3)
        assert best <= min(data["relative_std"]["k1"][k], data["relative_std"]["k3"][k])


def test_06_k3_is_the_noisier_above_the_crossing_and_not_below():
    data = committed("06")
    low, high = 0.1, 2.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if math.exp(2 * middle) - 1 < 4 * middle else (low, middle)
    assert data["crossing"]["kl"] == pytest.approx(low, abs=1e-12)
    assert round(low, 3) == 0.628
    assert [
        k3 > k1
        for k1, k3 in zip(data["relative_std"]["k1"], data["relative_std"]["k3"], strict=True)
    ] == [kl > low for kl in data["kl"]]
    assert data["relative_std"]["k3"][-1] > 8 * data["relative_std"]["k1"][-1]


def test_06_the_published_table_is_reproduced_to_its_digits():
    published = committed("06")["published"]
    functions = {"k1": lambda u: u, "k2": lambda u: u**2 / 2, "k3": lambda u: np.expm1(-u) + u}
    for k, kl in enumerate(published["kl"]):
        for name, function in functions.items():
            mean, variance = gaussian_moments(kl, function)
            assert published["relative_std"][name][k] == pytest.approx(
                math.sqrt(variance) / kl, abs=0.006
            )
            assert published["relative_bias"][name][k] == pytest.approx(mean / kl - 1, abs=0.0006)


# 07


class PlainGradients:
    """One sample of every gradient of figure 07, on sentences of two words, in plain Python and
    sequence logits.
    """

    def __init__(self, pi, q, mu):
        self.pi, self.q, self.mu = pi, q, mu

    def step(self, p, y):
        """p of the first word, and of the second given the first."""
        first = math.fsum(p[x] for x in p if x[0] == y[0])
        return first, p[y] / first

    def scores(self, y):
        """∇ log π of each word."""
        first = self.step(self.pi, y)[0]
        within = {x: self.pi[x] / first if x[0] == y[0] else 0.0 for x in self.pi}
        return np.array(
            [[within[x] - self.pi[x] for x in self.pi], [(x == y) - within[x] for x in self.pi]]
        )

    def kl_gradients(self, y):
        """∇KL of each word with its prefix held fixed, and the KL of the second word."""
        (first, _), found = self.step(self.pi, y), np.zeros((2, len(self.pi)))
        second = 0.0
        for x, p in self.pi.items():
            ratio = [
                math.log(a / b)
                for a, b in zip(self.step(self.pi, x), self.step(self.q, x), strict=True)
            ]
            found[0] += p * ratio[0] * self.scores(x)[0]
            if x[0] == y[0]:
                found[1] += p / first * ratio[1] * self.scores(x)[1]
                second += p / first * ratio[1]
        return found, second

    def of(self, estimator, y):
        s, (kl_slopes, later) = self.scores(y), self.kl_gradients(y)
        ratio = [
            math.log(a / b)
            for a, b in zip(self.step(self.pi, y), self.step(self.q, y), strict=True)
        ]
        rho = [a / b for a, b in zip(self.step(self.pi, y), self.step(self.mu, y), strict=True)]
        u, weight, whole = sum(ratio), rho[0] * rho[1], s.sum(0)
        slope = [1 - math.exp(-x) for x in ratio]  # of k3, word by word
        k3 = [math.exp(-x) - 1 + x for x in ratio]
        return {
            "reward_k1": u * whole,
            "reward_k1_to_go": u * s[0] + ratio[1] * s[1],
            "reward_k3": (math.exp(-u) - 1 + u) * whole,
            "loss_k1": whole,
            "loss_k2": u * whole,
            "loss_k3": (1 - math.exp(-u)) * whole,
            "loss_k2_token": ratio @ s,
            "loss_k3_token": slope @ s,
            "loss_full_kl": kl_slopes.sum(0),
            "rao_blackwell_to_go": kl_slopes.sum(0) + later * s[0],
            "live_ratio_k3": weight * u * whole,
            "live_ratio_k3_token": rho[0] * ratio[0] * s[0] + rho[1] * ratio[1] * s[1],
            "detached_ratio_k3": weight * (1 - math.exp(-u)) * whole,
            "off_policy_unweighted": u * whole,
            "off_policy_token": rho[0] * ratio[0] * s[0] + rho[1] * ratio[1] * s[1],
            "off_policy_prefix": (
                (rho[0] * ratio[0] + weight * ratio[1]) * s[0] + weight * ratio[1] * s[1]
            ),
            "off_policy_sequence": weight * u * whole,
            "live_ratio_k3_prefix": (
                rho[0] * (k3[0] + slope[0]) * s[0] + weight * (k3[1] * whole + slope[1] * s[1])
            ),
        }[estimator]

    def moments(self, estimator):
        """Relative bias for ∇KL(π‖q), and the standard deviation."""
        meant = reference.gradient(self.pi, lambda y: math.log(self.pi[y] / self.q[y]))
        meant = np.array([meant[y] for y in self.pi])
        samples = {y: self.of(estimator, y) for y in self.mu}
        mean = sum(self.mu[y] * samples[y] for y in self.mu)
        variance = sum(self.mu[y] * ((samples[y] - mean) ** 2).sum() for y in self.mu)
        return np.linalg.norm(mean - meant) / np.linalg.norm(meant), math.sqrt(variance)


def sentences_at(kl_coef):
    q = {tuple(y.split()): p for y, p in FOUR_SENTENCES.items()}
    return (
        reference.posterior(q, {tuple(y.split()): r for y, r in FOUR_REWARDS.items()}, kl_coef)[0]
        if kl_coef < math.inf
        else q
    )


def test_07_every_placement_is_what_plain_python_enumerates():
    data = committed("07")
    pi, q = sentences_at(data["kl_coef"]), sentences_at(math.inf)
    assert data["policy"] == pytest.approx(list(pi.values()), abs=1e-12)
    for row in data["on_policy"]:
        assert (row["bias"], row["std"]) == pytest.approx(
            PlainGradients(pi, q, pi).moments(row["estimator"]), abs=1e-11
        ), row["estimator"]


def test_07_every_weight_at_every_age_is_what_plain_python_enumerates():
    data = committed("07")
    pi, q = sentences_at(data["kl_coef"]), sentences_at(math.inf)
    assert (data["age"][0], data["age"][-1]) == (0, 1)
    for k, age in enumerate(data["age"]):
        mu = sentences_at(data["kl_coef"] / (1 - age) if age < 1 else math.inf)
        assert data["staleness"][k] == pytest.approx(reference.kl(pi, mu), abs=1e-12)
        for row in data["off_policy"]:
            assert (row["bias"][k], row["std"][k]) == pytest.approx(
                PlainGradients(pi, q, mu).moments(row["estimator"]), abs=1e-11
            ), row["estimator"]


def test_07_on_policy_k2_is_the_loss_that_follows_the_kl():
    rows = {row["estimator"]: row for row in committed("07")["on_policy"]}
    unbiased = {name for name, row in rows.items() if row["bias"] < 1e-12}
    assert unbiased == {
        "reward_k1",
        "reward_k1_to_go",
        "loss_k2",
        "rao_blackwell_to_go",
        "live_ratio_k3",
    }
    assert rows["loss_k1"]["bias"] == pytest.approx(1, abs=1e-12)  # its mean is 0
    assert rows["loss_k1"]["std"] == max(row["std"] for row in rows.values())
    assert rows["loss_k3"]["bias"] == pytest.approx(rows["detached_ratio_k3"]["bias"], abs=1e-12)
    assert rows["live_ratio_k3_token"]["bias"] == pytest.approx(
        rows["loss_full_kl"]["bias"], abs=1e-12
    )
    assert rows["loss_full_kl"]["bias"] > 0.2
    assert min(unbiased, key=lambda name: rows[name]["std"]) == "rao_blackwell_to_go"


def test_07_off_policy_exact_weights_cost_noise_and_no_weight_costs_bias():
    rows = {row["estimator"]: row for row in committed("07")["off_policy"]}
    for name in ("off_policy_prefix", "off_policy_sequence", "live_ratio_k3_prefix"):
        assert max(rows[name]["bias"]) < 1e-12
    for name in ("loss_k1", "loss_k3", "off_policy_unweighted", "off_policy_token"):
        assert all(a < b for a, b in itertools.pairwise(rows[name]["bias"])), name
    assert max(rows["detached_ratio_k3"]["bias"]) - min(rows["detached_ratio_k3"]["bias"]) < 1e-12
    for name in ("off_policy_prefix", "off_policy_sequence"):
        assert all(a < b for a, b in itertools.pairwise(rows[name]["std"])), name
    assert (
        rows["live_ratio_k3_prefix"]["std"][-1]
        < rows["off_policy_prefix"]["std"][-1]
        < rows["off_policy_sequence"]["std"][-1]
    )


# 16


def test_16_the_optimum_hits_its_target_and_the_network_comes_near():
    data = committed("16")
    assert data["exact"]["attained"] == pytest.approx(data["target"], abs=1e-11)
    for mu, beta, kl in zip(
        data["target"], data["exact"]["coefficient"], data["exact"]["kl"], strict=True
    ):
        assert beta == pytest.approx(math.log(mu / (1 - mu)) - math.log(0.4 / 0.6), abs=1e-9)
        assert kl == pytest.approx(
            mu * math.log(mu / 0.4) + (1 - mu) * math.log((1 - mu) / 0.6), abs=1e-10
        )
    assert all(abs(side["attained"] - side["target"]) < 0.05 for side in data["trained"])
    assert max(abs(side["attained"] - side["target"]) for side in data["trained"]) > 1e-3


# 17


def test_17_follows_both_laws_and_keeps_the_priors_ratio_at_equal_rewards():
    data = committed("17")
    assert data["unequal"]["reverse_kl"] == pytest.approx(data["reverse_law"], rel=1e-9)
    smallest = data["unequal"]["forward_kl"][0]  # the next term of λq/Δr is of order λ
    assert smallest == pytest.approx(data["forward_law"][0], rel=0.05)
    for name in ("reverse_kl", "forward_kl"):
        assert data["equal"][name] == pytest.approx([0.4] * len(data["kl_coef"]), abs=1e-12)


# 15


def test_15_entropy_goes_to_the_posterior_s_with_the_kl_term_and_to_zero_without():
    data = committed("15")
    assert [run["kl_coef"] for run in data["runs"]] == [0.5, 0.25, 0.0]
    for run in data["runs"]:
        assert run["entropy"][0] == pytest.approx(data["prior_entropy"], abs=1e-12)
        assert run["entropy"][-1] == pytest.approx(run["posterior_entropy"], abs=0.05)
    with_kl, _, without = data["runs"]
    assert with_kl["entropy"][-1] > 3.8
    assert without["posterior_entropy"] == 0
    assert without["entropy"][-1] < 0.05
    assert without["probabilities"][0] > 0.99
    assert without["best"] == "gonzalez"


def test_15_the_posteriors_are_those_of_plain_dictionaries():
    problem = figures.load_module(ENTRIES["02"].script).surnames_by_score(100)  # the same problem
    support = klrl.problem_support(problem)
    names = problem.space.decode(support.tokens)
    q, r = (
        dict(zip(names, support.log_prior.exp().tolist(), strict=True)),
        dict(zip(names, support.rewards.tolist(), strict=True)),
    )
    for run in committed("15")["runs"][:2]:
        star, _ = reference.posterior(q, r, run["kl_coef"])
        assert run["posterior"] == pytest.approx(sorted(star.values(), reverse=True), abs=1e-12)
        assert run["posterior_entropy"] == pytest.approx(reference.entropy(star), abs=1e-12)
        assert math.fsum(run["probabilities"]) == pytest.approx(1, abs=1e-12)
        distance = (
            math.fsum(
                abs(p - s) for p, s in zip(run["probabilities"], run["posterior"], strict=True)
            )
            / 2
        )
        assert distance < 0.04


# 19


def test_19_every_iterate_is_the_posterior_at_its_lambda():
    data = committed("19")
    assert data["largest_deviation"] < 1e-12
    for run in data["runs"]:
        for kl_coef, row in zip(run["kl_coef"], run["probabilities"], strict=True):
            star, _ = reference.posterior(FOUR_SENTENCES, FOUR_REWARDS, kl_coef)
            assert dict(zip(data["sentences"], row, strict=True)) == pytest.approx(
                star, abs=1e-12
            ), (run["name"], kl_coef)


def test_19_the_lambdas_are_those_of_the_formulas():
    rules = {
        "natural gradient": lambda t: 1 / (1 - 0.9**t),
        "proximal": lambda t: 1 / (1 - 1.1**-t),
        "reward only": lambda t: 10 / t,
    }
    runs = {run["name"]: run for run in committed("19")["runs"]}
    assert set(runs) == set(rules)
    for name, rule in rules.items():
        assert runs[name]["kl_coef"] == pytest.approx(
            [rule(t) for t in runs[name]["step"]], rel=1e-12
        )
    assert runs["reward only"]["probabilities"][199][3] == pytest.approx(0.999999991755, abs=1e-12)


def test_19_one_whole_step_arrives_and_the_plain_gradient_takes_another_way():
    data = committed("19")
    known = [0.467416455322, 0.128964678284, 0.085976452189, 0.317642414206]
    assert data["one_step"] == pytest.approx(known, abs=1e-12)
    plain = torch.tensor(data["plain_gradient"]["probabilities"])
    assert plain[-1].tolist() == pytest.approx(known, abs=1e-3)
    sweep = torch.tensor(data["sweep"]["posterior"])
    away = torch.cdist(plain[5:6].double(), sweep.double()).min()
    assert away > 0.03

"""Every figure of the registry: what is committed is what its script computes, and what it shows holds."""

import dataclasses
import functools
import itertools
import json
import math
import statistics

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
    assert all(ax.get_xlabel() and ax.get_ylabel() and ax.get_title(loc="left") for ax in picture.axes)
    assert all(script.with_suffix(suffix).stat().st_size > 10_000 for suffix in (".png", ".pdf"))


@pytest.mark.parametrize("number", ENTRIES)
def test_the_config_is_frozen_and_the_docstring_names_source_and_every_datum(number):
    module = figures.load_module(ENTRIES[number].script)
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(module.Config(), dataclasses.fields(module.Config)[0].name, 1)
    assert ENTRIES[number].source
    first_column = [line.strip().split("  ")[0] for line in module.__doc__.partition("\nData")[2].splitlines()]
    assert set(committed(number)) <= {name.strip() for names in first_column for name in names.split(",")}


def test_the_table_of_the_folder_is_the_registry():
    assert (figures.figures_folder() / "README.md").read_text(encoding="utf-8") == figures.registry_table()


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
    q, r = dict(zip(names, support.log_prior.exp().tolist(), strict=True)), dict(zip(names, support.rewards.tolist(), strict=True))
    return kl_coef * reference.posterior(q, r, kl_coef)[1]


def test_02_nothing_lies_above_the_frontier():
    data = committed("02")
    shortfalls = [value for run in data["runs"] for value in run["shortfall"]]
    assert min(shortfalls) >= -1e-12
    assert (data["smallest_shortfall"], data["largest_shortfall"]) == (min(shortfalls), max(shortfalls))


@pytest.mark.parametrize("kl_coef", [0.1, 0.25, 1.0, 4.0])
def test_02_every_run_is_below_every_tangent(kl_coef):
    value = frontier_value(kl_coef)
    points = [point for run in committed("02")["runs"] for point in zip(run["kl_to_prior"], run["expected_reward"], strict=True)]
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
        assert height(point(kl_coef)["kl_to_prior"]) == pytest.approx(point(kl_coef)["expected_reward"], abs=1e-12)
    assert height(100.0) == pytest.approx(2.7, abs=1e-12)


# 03


def test_03_stays_below_the_formula_and_ends_on_the_best_levels_mass():
    data = committed("03")
    for prior in data["priors"]:
        assert all(kl <= bound + 1e-12 for kl, bound in zip(prior["kl"], data["bound"], strict=True))
        assert prior["kl"][-1] == pytest.approx(prior["limit"], abs=1e-9)
        assert data["bound"][-1] > prior["limit"] + 2
    for prior in data["priors"][1:]:  # uniform over L: within 0.04 nats of log L at n ≈ 5L
        size = round(math.exp(prior["limit"]))
        near = next(k for k, n in enumerate(data["n"]) if n >= 5 * size)
        assert prior["kl"][near] == pytest.approx(math.log(size), abs=0.04)


def test_03_best_of_n_never_lies_above_the_frontier():
    data = committed("03")
    log_q, rewards = (torch.tensor(data["problem"][name], dtype=torch.float64) for name in ("log_prior", "rewards"))
    for kl, reward in list(zip(data["best_of_n"]["kl"], data["best_of_n"]["expected_reward"], strict=True))[1:-8]:  # inside the range of KL
        most = klrl.budget.frontier(log_q, rewards, [klrl.budget.kl_coef_for_budget(log_q, rewards, kl)]).expected_reward
        assert reward <= float(most) + 1e-12


# 04


def test_04_optima_are_distributions_on_their_curves_and_only_chi_squared_has_zeros():
    data = committed("04")
    assert {side["name"]: bool(side["zeros"]) for side in data["optima"]} == {side["name"]: side["name"] == "χ²" for side in data["optima"]}
    for side in data["optima"]:
        assert sum(side["probabilities"]) == pytest.approx(1, abs=1e-12)
        ends = [side["probabilities"][k] / data["prior"][k] for k in (0, -1)]
        assert [data["curves"][side["name"]][k] for k in (0, -1)] == pytest.approx(ends, rel=1e-6, abs=1e-9)


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
    """Figure 05's process in plain dictionaries: state -> action -> (prior, reward, {reply: probability})."""
    process = {k: {"ask": (0.75, -0.02, {k - 1: 0.7, k: 0.22, "annoyed": 0.08}), "answer": (0.25, 0.3, {"over": 1.0})} for k in range(points, 0, -1)}
    process[0] = {"ask": (0.2, -0.02, {0: 0.8, "annoyed": 0.2}), "answer": (0.8, 2.0, {"over": 1.0})}
    process["annoyed"] = {"ask": (0.5, -0.2, {"annoyed": 0.5, "over": 0.5}), "answer": (0.5, -0.1, {"over": 1.0})}
    return process


def start_value(process, start, gamma, summary):
    """The value of `start` after enough sweeps of V(s) = summary of (q, r + γ Σ P V) over actions."""
    value = dict.fromkeys([*process, "over"], 0.0)
    for _ in range(600):
        for state, choices in process.items():
            value[state] = summary([(q, r + gamma * sum(p * value[after] for after, p in replies.items())) for q, r, replies in choices.values()])
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
    best = start_value(process, 6, 0.95, lambda row: 0.1 * math.log(math.fsum(q * math.exp(value / 0.1) for q, value in row)))
    assert data["value"] == pytest.approx(best, abs=1e-12)
    assert data["prior_value"] == pytest.approx(start_value(process, 6, 0.95, lambda row: math.fsum(q * v for q, v in row)), abs=1e-12)
    assert start_value(process, 6, 0.95, lambda row: max(v for _, v in row)) > best > data["prior_value"] + 0.18  # a wrong sum is another number


def test_05_gaps_are_never_negative_and_no_plan_exceeds_its_bound():
    learners = learners_of_05()
    assert all(0 <= gap < 1 for learner in learners.values() for row in learner["gaps"] for gap in row)
    planning = learners["planning on the estimated model"]
    pairs = [pair for rows in zip(planning["gaps"], planning["bounds"], strict=True) for pair in zip(*rows, strict=True)]
    assert len(pairs) == 5 * 11
    assert all(gap <= bound for gap, bound in pairs)
    assert all(row[-1] < 0.25 * row[0] for row in planning["bounds"])


def test_05_every_route_arrives():
    for name, fraction in (("planning on the estimated model", 1e-3), ("soft Q-learning", 2e-3), ("policy gradient", 2e-2)):
        gaps = list(medians_of_05(name).values())
        assert gaps[-1] < fraction * gaps[0], name


def test_05_planning_comes_first_q_learning_later_on_the_same_episodes_and_the_policy_gradient_last():
    learners = learners_of_05()
    planning, q_learning = (learners[name] for name in ("planning on the estimated model", "soft Q-learning"))
    assert planning["transitions"] == q_learning["transitions"]
    small = 0.01
    assert 10 * first_below("planning on the estimated model", small) < first_below("soft Q-learning", small)
    assert first_below("soft Q-learning", small) < first_below("policy gradient", small)
    plan, learned = medians_of_05("planning on the estimated model"), medians_of_05("soft Q-learning")
    assert [n for n in plan if plan[n] > learned[n]] == [n for n in plan if n < 100]  # a handful of episodes is no model
    assert all(committed("05")["value"] - plan[n] < committed("05")["prior_value"] for n in plan if n < 100)


# 16


def test_16_the_optimum_hits_its_target_and_the_network_comes_near():
    data = committed("16")
    assert data["exact"]["attained"] == pytest.approx(data["target"], abs=1e-11)
    for mu, beta, kl in zip(data["target"], data["exact"]["coefficient"], data["exact"]["kl"], strict=True):
        assert beta == pytest.approx(math.log(mu / (1 - mu)) - math.log(0.4 / 0.6), abs=1e-9)
        assert kl == pytest.approx(mu * math.log(mu / 0.4) + (1 - mu) * math.log((1 - mu) / 0.6), abs=1e-10)
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
    q, r = dict(zip(names, support.log_prior.exp().tolist(), strict=True)), dict(zip(names, support.rewards.tolist(), strict=True))
    for run in committed("15")["runs"][:2]:
        star, _ = reference.posterior(q, r, run["kl_coef"])
        assert run["posterior"] == pytest.approx(sorted(star.values(), reverse=True), abs=1e-12)
        assert run["posterior_entropy"] == pytest.approx(reference.entropy(star), abs=1e-12)
        assert math.fsum(run["probabilities"]) == pytest.approx(1, abs=1e-12)
        distance = math.fsum(abs(p - s) for p, s in zip(run["probabilities"], run["posterior"], strict=True)) / 2
        assert distance < 0.04


# 19


def test_19_every_iterate_is_the_posterior_at_its_lambda():
    data = committed("19")
    assert data["largest_deviation"] < 1e-12
    for run in data["runs"]:
        for kl_coef, row in zip(run["kl_coef"], run["probabilities"], strict=True):
            star, _ = reference.posterior(FOUR_SENTENCES, FOUR_REWARDS, kl_coef)
            assert dict(zip(data["sentences"], row, strict=True)) == pytest.approx(star, abs=1e-12), (run["name"], kl_coef)


def test_19_the_lambdas_are_those_of_the_formulas():
    rules = {"natural gradient": lambda t: 1 / (1 - 0.9**t), "proximal": lambda t: 1 / (1 - 1.1**-t), "reward only": lambda t: 10 / t}
    runs = {run["name"]: run for run in committed("19")["runs"]}
    assert set(runs) == set(rules)
    for name, rule in rules.items():
        assert runs[name]["kl_coef"] == pytest.approx([rule(t) for t in runs[name]["step"]], rel=1e-12)
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

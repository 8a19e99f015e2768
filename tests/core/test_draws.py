"""Draws and the enumeration of executions."""

import itertools
import math

import pytest
import torch

from klrl_edu.core import draws
from klrl_edu.core.draws import as_generator, enumerate_executions, seeded_draw
from klrl_edu.core.errors import InputError, TooLargeError
from klrl_edu.core.spaces import SequenceSpace
from klrl_edu.models.table import SequenceTable
from klrl_edu.testing import assert_samples_from

INF = math.inf


def test_draws_follow_the_probabilities():
    log_probs = torch.tensor([0.5, 0.2, 0.0, 0.05, 0.25], dtype=torch.float64).log()
    space = SequenceSpace(tuple("abcde"), 1, eos=False)
    table = SequenceTable(space, space.all_tokens(), log_probs)
    assert_samples_from(
        lambda n, *, draw: draw(log_probs[None], torch.zeros(n, dtype=torch.long))[:, None], table
    )


def test_draws_never_take_zero_mass_wherever_it_stands():
    log_probs = torch.full((3, 40), -INF, dtype=torch.float64)
    log_probs[0, 0] = log_probs[1, 20] = log_probs[2, 39] = 0
    draw = seeded_draw(0)
    for _ in range(200):
        assert draw(log_probs).tolist() == [0, 20, 39]


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-53])
@pytest.mark.parametrize("log_total", [0.0, -744.0, 300.0, math.log(1 / 3)])
def test_no_uniform_lands_on_zero_mass_or_past_the_last_outcome(monkeypatch, uniform, log_total):
    monkeypatch.setattr(
        torch, "rand", lambda *shape, **_: torch.full(shape, uniform, dtype=torch.float64)
    )
    log_probs = torch.tensor([[-INF, -1.0, -INF, -0.5, -INF]], dtype=torch.float64) + log_total
    assert seeded_draw(0)(log_probs).item() in (1, 3)


def test_rows_say_which_row_each_draw_takes():
    log_probs = torch.tensor([[0.0, -INF], [-INF, 0.0]])
    assert seeded_draw(0)(log_probs, torch.tensor([1, 0, 0, 1])).tolist() == [1, 0, 0, 1]


def test_equal_seeds_draw_alike_and_a_shared_generator_moves_on():
    log_probs = torch.zeros(50, 10)
    assert torch.equal(seeded_draw(3)(log_probs), seeded_draw(3)(log_probs))
    generator = as_generator(3)
    first, second = seeded_draw(generator)(log_probs), seeded_draw(generator)(log_probs)
    assert torch.equal(first, seeded_draw(3)(log_probs))
    assert not torch.equal(first, second)


def test_drawing_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    seeded_draw(0)(torch.zeros(5, 4))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("seed", [-1, 2**63, 1.5, True, None, "0"])
def test_a_seed_that_is_not_a_whole_number_in_range_is_refused(seed):
    with pytest.raises(InputError, match="seed"):
        seeded_draw(seed)


@pytest.mark.parametrize("bad", [-INF, math.nan])
@pytest.mark.parametrize("how", ["seeded", "enumerated"])
def test_a_row_without_mass_or_with_nan_is_refused(bad, how):
    log_probs = torch.tensor([[0.0, 0.0], [bad, bad]])
    with pytest.raises(InputError, match="no mass"):
        (
            seeded_draw(0)(log_probs)
            if how == "seeded"
            else enumerate_executions(lambda draw: draw(log_probs))
        )


def test_a_program_without_draws_has_one_outcome_of_probability_one():
    assert enumerate_executions(lambda draw: "done") == [("done", 0.0)]


def test_two_dice_have_thirty_six_outcomes_and_the_triangular_sum():
    die = torch.zeros(1, 6, dtype=torch.float64)
    outcomes = enumerate_executions(lambda draw: int(draw(die, torch.tensor([0, 0])).sum()) + 2)
    mass = {
        total: math.fsum(math.exp(e.log_prob) for e in outcomes if e.result == total)
        for total in range(2, 13)
    }
    assert len(outcomes) == 36
    assert mass == pytest.approx({total: (6 - abs(7 - total)) / 36 for total in mass}, rel=1e-13)


def test_outcomes_of_zero_mass_are_not_run_and_later_draws_may_depend_on_earlier_ones():
    def walk(draw):
        place, path = 0, []
        while (
            place < 2 and len(path) < 3
        ):  # 0: stay never, go on to 1 (½) or leap to 2 (½); 1: always to 2
            place = int(
                draw(
                    torch.tensor([[-INF, math.log(0.5), math.log(0.5)], [-INF, -INF, 0.0]])[
                        place : place + 1
                    ]
                )
            )
            path.append(place)
        return tuple(path)

    outcomes = enumerate_executions(walk)
    assert [e.result for e in outcomes] == [(1, 2), (2,)]
    assert [e.log_prob for e in outcomes] == pytest.approx(
        [math.log(0.5)] * 2, rel=1e-6
    )  # float32 rows


def test_executions_of_several_rows_are_their_product():
    log_probs = torch.tensor([[0.1, 0.9], [0.7, 0.3]], dtype=torch.float64).log()
    outcomes = enumerate_executions(lambda draw: tuple(draw(log_probs).tolist()))
    expected = {
        (i, j): float(log_probs[0, i] + log_probs[1, j])
        for i, j in itertools.product(range(2), repeat=2)
    }
    assert dict(outcomes) == pytest.approx(expected, rel=1e-14)


def test_rows_are_normalised_before_they_count():
    outcomes = enumerate_executions(
        lambda draw: int(draw(torch.tensor([[700.0, 700.0]], dtype=torch.float64)))
    )
    assert [e.log_prob for e in outcomes] == pytest.approx([-math.log(2)] * 2, rel=1e-13)


def test_more_outcomes_than_allowed_are_refused_and_exactly_as_many_are_not():
    coin = torch.zeros(1, 2)
    flips = torch.zeros(4, dtype=torch.long)
    assert len(enumerate_executions(lambda draw: draw(coin, flips), max_executions=16)) == 16
    with pytest.raises(TooLargeError, match="more than max_executions = 15"):
        enumerate_executions(lambda draw: draw(coin, flips), max_executions=15)


def endless_flips(draw):
    while True:
        draw(torch.zeros(1, 2))


def until_a_tail(draw):
    flips = 0
    while int(draw(torch.zeros(1, 2))):
        flips += 1
    return flips


def endless_certainty(draw):
    while True:
        draw(torch.zeros(1, 1), torch.zeros(1000, dtype=torch.long))


@pytest.mark.parametrize("program", [endless_flips, until_a_tail, endless_certainty])
def test_a_program_that_does_not_end_is_refused(program, monkeypatch):
    monkeypatch.setattr(draws, "_MOST_CHOICES", 30)
    monkeypatch.setattr(draws, "_MOST_DRAWS", 5_000)
    with pytest.raises(TooLargeError, match="has not ended; end it, or sample"):
        enumerate_executions(program)


def test_a_long_program_with_few_outcomes_runs():
    """2,000 draws, of which the last alone is random."""

    def program(draw):
        draw(torch.zeros(1, 1), torch.zeros(2000, dtype=torch.long))
        return int(draw(torch.zeros(1, 2)))

    assert [outcome.result for outcome in enumerate_executions(program)] == [0, 1]

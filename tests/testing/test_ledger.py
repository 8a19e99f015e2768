"""The ledger's sum and its text."""

import math

import pytest

from klrl_edu.core.errors import InputError
from klrl_edu.testing.ledger import Ledger


def ledger(*false_alarms):
    made = Ledger()
    for delta in false_alarms:
        made.record("assert_mine", false_alarm=delta, detectable=0.5, unit="of a mean")
    return made


def test_the_union_bound_is_the_sum_and_a_probability():
    assert ledger().false_alarm == 0
    assert ledger(*[1e-9] * 1000).false_alarm == pytest.approx(1e-6, rel=1e-12)
    assert ledger(0.7, 0.6).false_alarm == 1


@pytest.mark.parametrize("value", [math.nan, math.inf, -1e-9, True, 1 + 1j])
def test_what_is_no_probability_is_not_added_up(value):
    made = Ledger()
    for name in ("false_alarm", "detectable"):
        given = {"false_alarm": 1e-9, "detectable": 0.5, name: value}
        with pytest.raises(InputError, match=f"^{name} = .* must be a number from 0 to 1"):
            made.record("assert_mine", **given, unit="of a mean")
    assert made.entries == []


def test_an_entry_has_the_name_of_its_test(request):
    assert [entry.test for entry in ledger(1e-9, 1e-8).entries] == [request.node.nodeid] * 2


def test_outside_pytest_an_entry_has_no_test(monkeypatch):
    monkeypatch.delenv("PYTEST_CURRENT_TEST")
    assert ledger(1e-9).entries[0].test == ""


def test_the_largest_are_listed_and_the_rest_summed():
    lines = ledger(1e-9, 4e-7, 2e-9, 3e-9).summary(most=2)
    assert (
        lines[0]
        == "4 in all; a correct library fails one of them with probability at most 4.06e-07 (union"
        " bound)"
    )
    assert [line.split()[0] for line in lines[1:]] == ["4.00e-07", "3.00e-09", "3.00e-09"]
    assert lines[-1].endswith("in 2 more")
    assert len(ledger(1e-9, 2e-9).summary(most=2)) == 3

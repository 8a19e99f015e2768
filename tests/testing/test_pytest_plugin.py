"""The plugin from outside: each test runs pytest in a process of its own and reads what it
prints.
"""

import argparse
from pathlib import Path

import pytest

import klrl_edu
from klrl_edu import pytest_plugin

pytest_plugins = ["pytester"]

ROOT = Path(klrl_edu.__file__).parents[1]
TWO_TESTS = """
    from klrl_edu.testing import ledger

    def test_one():
        ledger.run.record("assert_mine", false_alarm=1e-7, detectable=0.25, unit="of a mean")

    def test_two():
        ledger.run.record("assert_mine", false_alarm=3e-7, detectable=0.125, unit="of a mean")
"""


@pytest.fixture
def run(pytester, monkeypatch):
    """run(*options) -> the outcome of pytest on the files that a test has made; the plugin is
    loaded as a user without the entry point would.
    """
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return lambda *options: pytester.runpytest_subprocess("-p", "klrl_edu.pytest_plugin", *options)


def test_the_ledger_is_summed_and_printed_with_the_least_certain_first(pytester, run):
    pytester.makepyfile(test_it=TWO_TESTS)
    result = run()
    assert result.ret == 0
    result.stdout.fnmatch_lines(
        [
            "=* klrl_edu: statistical assertions =*",
            (
                "2 in all; a correct library fails one of them with probability at most 4e-07"
                " (union bound)"
            ),
            " 3.00e-07  finds 1.25e-01 of a mean  assert_mine  test_it.py::test_two",
            " 1.00e-07  finds 2.50e-01 of a mean  assert_mine  test_it.py::test_one",
            "they draw from --klrl-seed=0",
        ],
        consecutive=True,
    )


def test_a_run_without_statistical_assertions_prints_nothing(pytester, run):
    pytester.makepyfile("def test_it(): pass")
    assert "in all; " not in run("--klrl-false-alarm", "0").stdout.str()


@pytest.mark.parametrize(
    ("workers", "bar", "code"),
    [([], "3.9e-7", 1), (["-n", "2"], "3.9e-7", 1), (["-n", "2"], "4.1e-7", 0)],
    ids=["alone", "xdist", "below"],
)
def test_a_sum_above_the_bar_fails_the_run_and_workers_add_up(pytester, run, workers, bar, code):
    pytester.makepyfile(test_it=TWO_TESTS)
    result = run("--klrl-false-alarm", bar, *workers)
    assert result.ret == code
    result.stdout.fnmatch_lines(["2 in all; * at most 4e-07 (union bound)", "*2 passed*"])
    failed = (
        "FAILED: the run may raise a false alarm with probability 4e-07, which is 1e-08 above"
        " --klrl-false-alarm 3.9e-07*"
    )
    (result.stdout.fnmatch_lines if code else result.stdout.no_fnmatch_line)(failed)


def test_a_run_that_fails_anyway_keeps_its_exit_code(pytester, run):
    pytester.makepyfile(TWO_TESTS + "\n\n    def test_three():\n        raise KeyboardInterrupt\n")
    assert run("--klrl-false-alarm", "0").ret == pytest.ExitCode.INTERRUPTED


SEEN_SEED = """
    def test_seed(klrl_seed):
        from klrl_edu.testing import ledger
        assert ledger.run.seed == klrl_seed
        print("seen", klrl_seed)
        ledger.run.record("assert_mine", false_alarm=0.0, detectable=1.0, unit="")
"""


def test_a_random_seed_is_printed_and_gives_the_same_run_again(pytester, run):
    pytester.makepyfile(SEEN_SEED)
    first, second = (run("--klrl-seed=random", "-rP") for _ in range(2))
    assert printed_seed(first) != printed_seed(second)
    assert printed_seed(run(f"--klrl-seed={printed_seed(first)}", "-rP")) == printed_seed(first)


def test_workers_draw_from_the_seed_that_the_controller_prints(pytester, run):
    pytester.makepyfile(SEEN_SEED)
    printed_seed(run("--klrl-seed=random", "-rP", "-n", "1"))


def printed_seed(result):
    """The seed that the test saw, which must be the one in the header and in the summary."""
    seed = result.stdout.str().split("seen ")[1].split()[0]
    result.stdout.fnmatch_lines(
        [
            f"klrl_edu: statistical assertions draw from --klrl-seed={seed}",
            f"they draw from --klrl-seed={seed}",
        ]
    )
    assert result.ret == 0
    return seed


@pytest.mark.parametrize("text", ["-1", "1.5", "9223372036854775808", "", "Random"])
def test_what_is_no_seed_is_refused(text):
    with pytest.raises(
        argparse.ArgumentTypeError,
        match=r"is not a seed; give a whole number from 0 to 2\^63 - 1, or random",
    ):
        pytest_plugin._seed(text)


def test_what_is_no_probability_is_refused_on_the_command_line(run):
    result = run("--klrl-false-alarm=2")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(
        ["*argument --klrl-false-alarm: 2 is not a probability; give a number from 0 to 1*"]
    )


def test_an_installed_entry_point_a_conftest_and_p_load_it_once(pytester, run, monkeypatch):
    """The entry point is found as that of an installed package is: a .dist-info directory on the
    path.
    """
    info = pytester.mkdir("klrl_twin-0.1.0.dist-info")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: klrl_twin\nVersion: 0.1.0\n")
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    line = (
        project.split("[project.entry-points.pytest11]\n")[1]
        .splitlines()[0]
        .partition("  #")[0]
        .replace('"', "")
    )
    (info / "entry_points.txt").write_text(f"[pytest11]\n{line}\n")
    pytester.makepyfile(test_it=TWO_TESTS)
    for result in (run(), pytester.runpytest_subprocess()):
        result.assert_outcomes(passed=2)
        result.stdout.fnmatch_lines(["2 in all; *"])
    pytester.makeconftest('pytest_plugins = ["klrl_edu.pytest_plugin"]')
    for result in (run(), pytester.runpytest_subprocess()):
        result.assert_outcomes(passed=2)
        result.stdout.fnmatch_lines(["2 in all; *"])


FAILING = """
    from klrl_edu import SequenceTable
    from klrl_edu.testing import assert_samples_from

    def test_a_fair_coin(klrl_draw):
        fair, bent = (SequenceTable.from_texts({"head": p, "tail": 1 - p}) for p in (0.5, 0.6))
        assert set(fair.sample(20, draw=klrl_draw)[:, 0].tolist()) == {0, 1}
        assert_samples_from(bent.sample, fair, n=10_000)
"""


def test_a_failing_assertion_says_what_it_saw_its_error_probabilities_and_a_remedy(pytester, run):
    pytester.makepyfile(FAILING)
    result = run("--klrl-seed=5")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        [
            (
                "*10,000 samples are not from SequenceTable: 'head' came 6,* times, a share of"
                " 0.6*; expected 0.5, between 4,* and 5,* times*"
            ),
            (
                "*False-alarm probability *e-10; finds a bin's mass off by more than 0.0* with"
                " probability 1 ? 1e-06*"
            ),
            "1 in all; *",
        ]
    )
    result.stdout.fnmatch_lines(["*Remedy: *"])


FAILING_IN_EVERY_WAY = """
    import torch
    from klrl_edu import SequenceTable, losses
    from klrl_edu.testing import (
        assert_is_language_model, assert_mean_is, assert_same_gradient, assert_samples_from,
        assert_unbiased, assert_variance_at_most,
    )

    def mine(batch):
        return -losses.rloo(batch)

    class Broken(SequenceTable):
        def forward(self, tokens, prompt=None):
            return 2 * super().forward(tokens, prompt)  # step does not

    def table(share):
        return SequenceTable.from_texts({"head": share, "tail": 1 - share})

    def test_mean():
        assert_unbiased(mine, "objective")  # the line that asserts

    def test_gradient():
        assert_same_gradient(mine, losses.rloo)  # the line that asserts

    def test_variance():
        assert_variance_at_most(mine, 0.0)  # the line that asserts

    def test_samples():
        assert_samples_from(table(0.9).sample, table(0.5))  # the line that asserts

    def test_samples_mean():
        assert_mean_is(torch.ones(9999), 0.0, sigma=1, value_range=(-1, 1))  # the line that asserts

    def test_model():
        model = table(0.5)
        broken = Broken(model.space, model.tokens, torch.tensor([0.0, 1.0]))
        assert_is_language_model(broken)  # the line that asserts
"""


def test_a_failure_shows_the_line_that_asserts_and_the_report_and_no_line_of_the_package(
    pytester, run
):
    pytester.makepyfile(FAILING_IN_EVERY_WAY)
    result = run()
    result.assert_outcomes(failed=6)
    shown = result.stdout.str()
    assert "klrl_edu/testing/" not in shown
    assert "klrl_edu/audit/" not in shown
    assert sum(line.startswith(">") for line in shown.splitlines()) == 6
    assert sum("  # the line that asserts" in line for line in shown.splitlines()) == 6
    result.stdout.fnmatch_lines(
        [
            "E *mine is biased for objective (four sentences at ? = 0.5, batches of 2): *",
            "E *mine follows objective, scaled by -1: it lowers J.",
            "E *raises expected_reward *",
            "E *Remedy: *the sign is wrong*",
        ]
    )

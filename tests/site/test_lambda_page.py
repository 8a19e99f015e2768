"""The λ page holds Python's numbers, in a real browser."""

import json
import math
import random
import re

import pytest

import klrl_edu as klrl

pytest.importorskip("bokeh")
from klrl_edu.site.lambda_page import typed_table, write_lambda_page

TOLERANCE = 1e-9  # relative
ROUNDING = 1e-15  # absolute: log Z and KL near 0 carry the rounding of logs near 1
FOUR = "the cat, 0.4, 1\nthe dog, 0.3, 0\na cat, 0.2, 0\na dog, 0.1, 2"
MODEL = "Bokeh.documents[0].get_model_by_name"


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_lambda_page(tmp_path_factory.mktemp("lambda") / "lambda.html")


@pytest.fixture
def opened(page, path):
    """The page, loaded and computed; it asked for nothing but itself, and no script failed, also
    after what a test does.
    """
    page.goto(path.as_uri())
    page.wait_for_function("document.body.dataset.klrl")
    yield page
    assert page.asked == [path.as_uri()]
    assert page.wrong == []


def numbers(page):
    """What the page computed; infinities come as text."""
    return json.loads(page.evaluate("document.body.dataset.klrl"))


def expected(rows, kl_coef):
    """log Z, λ log Z, E[r], KL(π*‖q) and π* of rows (sentence, prob, reward), by the package."""
    prior = klrl.SequenceTable.from_texts({text: prob for text, prob, _ in rows}, normalize=True)
    reward = klrl.table_reward(
        {text: reward for text, prob, reward in rows if prob > 0}, prior.space
    )
    target = klrl.posterior(klrl.Problem(prior, reward, kl_coef))
    side = klrl.compare(target.model, target)
    mass = dict.fromkeys((text for text, *_ in rows), 0.0) | {
        text: p for text, _, _, p in target.rows()
    }
    found = {
        "logEvidence": float(target.log_evidence),
        "value": float(target.value),
        "expectedReward": side.expected_reward,
        "kl": side.kl_to_prior,
    }
    return found, [mass[text] for text, *_ in rows]


def assert_equal(page, rows, kl_coef):
    """Each number within TOLERANCE."""
    found = numbers(page)
    assert "error" not in found
    assert found["lambda"] == pytest.approx(kl_coef, rel=1e-15)
    assert found["sentences"] == [text for text, *_ in rows]
    want, mass = expected(rows, found["lambda"])
    for name, value in want.items():
        assert found[name] == pytest.approx(value, rel=TOLERANCE, abs=ROUNDING), (name, kl_coef)
    assert found["posterior"] == pytest.approx(mass, rel=TOLERANCE, abs=1e-300)


ROWS = [("the cat", 0.4, 1.0), ("the dog", 0.3, 0.0), ("a cat", 0.2, 0.0), ("a dog", 0.1, 2.0)]


def test_the_table_that_the_page_opens_with_is_the_four_sentences():
    assert typed_table(klrl.four_sentences()) == FOUR


def test_the_page_carries_its_scripts_and_links_only_home(path):
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"<script[^>]+src=", text)
    assert "<link" not in text
    assert text.count("href=") - text.count(".href=") >= 1
    assert 'href="index.html"' in text


def test_every_tenth_stop_of_the_slider_holds_pythons_numbers(opened):
    for stop in [*range(-100, 101, 10), -37, 73]:
        opened.evaluate(f"{MODEL}('slider').value = {stop / 100}")
        assert_equal(opened, ROWS, 20 ** (stop / 100))


def test_the_slider_moves_by_keyboard_and_the_typed_number_follows(opened):
    handle = opened.locator(".noUi-handle")
    handle.focus()
    handle.press("ArrowRight")
    opened.wait_for_function("JSON.parse(document.body.dataset.klrl).lambda > 1")
    assert_equal(opened, ROWS, 20**0.01)
    assert opened.evaluate(f"{MODEL}('lambda').value") == pytest.approx(20**0.01)


def test_a_typed_lambda_is_taken_as_it_is(opened):
    box = opened.get_by_label("or type λ")
    for typed in (0.5, 3, 137.25):  # the last one lies beyond the slider
        box.fill(str(typed))
        box.press("Enter")
        opened.wait_for_function(f"JSON.parse(document.body.dataset.klrl).lambda === {typed}")
        assert_equal(opened, ROWS, typed)
    box.fill("-1")
    box.press("Enter")
    opened.wait_for_function("JSON.parse(document.body.dataset.klrl).error")
    assert "positive" in opened.locator('[role="alert"]').inner_text()


def test_the_page_shows_the_numbers_of_the_course(opened):
    shown = " ".join(opened.locator("table").all_inner_texts())
    for digits in ("0.844243919543", "1.10270128373", "0.467416455322", "0.317642414206"):
        assert digits in shown


def test_a_typed_table_holds_pythons_numbers(opened):
    generator = random.Random(0)
    for words in (1, 2, 7, 40):
        rows = [
            (
                f"Satz{k} 猫, ja" if k % 3 else f"w{k}",
                generator.random() ** 3,
                generator.gauss(0, 3),
            )
            for k in range(words)
        ]
        rows += [("forbidden", 0.2, -math.inf), ("no mass", 0.0, 99.0)]
        opened.locator("textarea").fill(
            "\n".join(f"{text}, {prob!r}, {reward!r}" for text, prob, reward in rows)
        )
        opened.evaluate(f"{MODEL}('normalise').active = [0]")
        for stop in (-1, 0, 0.5, 1):
            opened.evaluate(f"{MODEL}('slider').value = {stop}")
            opened.wait_for_function(
                f"JSON.parse(document.body.dataset.klrl).sentences?.length === {len(rows)}"
            )
            assert_equal(opened, rows, 20**stop)


@pytest.mark.parametrize(
    "rows",
    [
        [("a", 0.5, 1e308), ("b", 0.5, -1e308)],
        [("a", 1e-300, 1.0), ("b", 1e-300, 0.0), ("c", 1.0, -2000.0)],
        [("a", 0.5, 1e-9), ("b", 0.5, 0.0)],
        [("a", 0.5, 500.0), ("b", 0.5, -500.0)],
        [("a", 1.0, 3.0)],
    ],
    ids=["huge", "tiny mass", "tiny reward", "far apart", "one"],
)
def test_hard_tables_hold_pythons_numbers(opened, rows):
    opened.locator("textarea").fill(
        "\n".join(f"{text}, {prob!r}, {reward!r}" for text, prob, reward in rows)
    )
    opened.wait_for_function(
        "JSON.parse(document.body.dataset.klrl).sentences?.join() ==="
        f" '{','.join(text for text, *_ in rows)}'"
    )
    found = numbers(opened)
    want, mass = expected(rows, 1.0)
    for name, value in want.items():
        assert float(found[name]) == pytest.approx(value, rel=TOLERANCE, abs=ROUNDING), name
    assert found["posterior"] == pytest.approx(mass, rel=TOLERANCE, abs=1e-300)


def test_a_kl_near_zero_keeps_its_digits(opened):
    opened.locator("textarea").fill("a, 0.5, 1e-9\nb, 0.5, 0")
    opened.wait_for_function("JSON.parse(document.body.dataset.klrl).sentences.length === 2")
    assert numbers(opened)["kl"] == pytest.approx(
        1.25e-19, rel=TOLERANCE, abs=0
    )  # (r/λ)²/8 to second order


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ("a, 0.5, 1\nb, 0.4, 1", "sum to 0.9000000000, not to 1"),
        ("a, 0.5, 1\nb, 0.500000002, 1", "not to 1"),
        ("a, -0.5, 1\nb, 1.5, 1", "Line 1: prob “-0.5” must be a number that is not negative"),
        ("a, nan, 1", "Line 1: prob “nan”"),
        ("a, , 1", "Line 1: prob “”"),
        ("a, inf, 1", "Line 1: prob “inf”"),
        ("a, 1, nan", "Line 1: reward “nan”"),
        ("a, 1, inf", "Line 1: reward “inf”"),
        ("a, 1, 0x10", "Line 1: reward “0x10”"),
        ("sentence,prob,reward\n\nb, 0.5, 1\n b ,0.5, 2", "Line 4: “b” already stands in line 3"),
        ("a, 0.5, -inf\nb, 0.5, −inf", "Z = 0"),
        ("a, 0, 1", "all 0"),
        ("a; 1; 1", "write two commas"),
        ("", "table is empty"),
        ("<img src=x onerror=alert(1)>, 0.5", "<img src=x onerror=alert(1)>, 0.5"),
    ],
)
def test_a_bad_table_says_what_is_wrong_and_shows_no_numbers(opened, table, says):
    opened.locator("textarea").fill(table)
    opened.wait_for_function("JSON.parse(document.body.dataset.klrl).error")
    assert says in opened.locator('[role="alert"]').inner_text()
    assert opened.evaluate(f"{MODEL}('numbers').text + {MODEL}('listing').text") == ""
    assert opened.locator("img").count() == 0


def test_a_sum_within_the_tolerance_and_a_ticked_box_are_accepted(opened):
    opened.locator("textarea").fill("a, 0.5, 1\nb, 0.5000000005, 0")
    opened.wait_for_function("JSON.parse(document.body.dataset.klrl).sentences?.length === 2")
    assert_equal(opened, [("a", 0.5, 1.0), ("b", 0.5000000005, 0.0)], 1.0)
    opened.locator("textarea").fill("a, 3, 1\nb, 1, 0\n<b>c</b>, 4, 0")
    opened.wait_for_function("JSON.parse(document.body.dataset.klrl).error")
    opened.get_by_label("divide by their sum").check()
    opened.wait_for_function("JSON.parse(document.body.dataset.klrl).sentences?.length === 3")
    assert_equal(opened, [("a", 3.0, 1.0), ("b", 1.0, 0.0), ("<b>c</b>", 4.0, 0.0)], 1.0)
    assert opened.locator("th b").count() == 0  # shown as text


def test_it_fits_a_narrow_screen(opened):
    assert opened.evaluate("document.documentElement.scrollWidth") <= 400

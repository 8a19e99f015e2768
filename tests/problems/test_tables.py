"""Files that people bring: what is read, and how each bad one is refused."""

import json
import math
import time
import unicodedata

import pytest

from klrl_edu.core.errors import InfeasibleError, InputError
from klrl_edu.exact.posterior import posterior
from klrl_edu.problems.tables import load_table
from tests.exact.dictionaries import text_dict

INF = math.inf
HEADER = "sentence,prob,reward\n"
COURSE = HEADER + "the cat,0.4,1\nthe dog,0.3,0\na cat,0.2,0\na dog,0.1,2\n"
NUMBERS = (("the cat", 0.4, 1), ("the dog", 0.3, 0), ("a cat", 0.2, 0), ("a dog", 0.1, 2))
COURSE_ROWS = [
    {"sentence": sentence, "prob": prob, "reward": reward} for sentence, prob, reward in NUMBERS
]
STAR = {
    "the cat": 0.467416455322,
    "the dog": 0.128964678284,
    "a cat": 0.085976452189,
    "a dog": 0.317642414206,
}


def write(tmp_path, content, name="table.csv"):
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def star(problem):
    target = posterior(problem)
    return text_dict(problem.space, target.enumerated().tokens, target.log_probs.exp())


def refused(tmp_path, content, message, name="table.csv", **options):
    with pytest.raises(InputError, match=message) as caught:
        load_table(write(tmp_path, content, name), 1.0, **options)
    assert name in str(caught.value)
    return str(caught.value)


# --- what is read ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("course.csv", COURSE),
        ("bom.csv", b"\xef\xbb\xbf" + COURSE.encode()),
        ("windows.CSV", COURSE.replace("\n", "\r\n")),
        (
            "spaced.csv",
            COURSE.replace(HEADER, " Sentence , PROB,Reward\n").replace("the cat", "  the   cat "),
        ),
        ("blank_lines.csv", COURSE.replace("\n", "\n\n")),
        ("course.json", json.dumps(COURSE_ROWS)),
        ("object.json", json.dumps({"sentences": COURSE_ROWS, "separator": " "})),
        ("bom.json", b"\xef\xbb\xbf" + json.dumps(COURSE_ROWS).encode()),
        ("text.json", json.dumps([row | {"prob": str(row["prob"])} for row in COURSE_ROWS])),
    ],
)
def test_csv_and_json_give_the_course_posterior(tmp_path, name, content):
    assert star(load_table(write(tmp_path, content, name), 1.0)) == pytest.approx(STAR, abs=5.1e-13)


def test_chinese_characters_are_words_when_the_separator_is_empty(tmp_path):
    path = write(tmp_path, HEADER + "猫在睡觉,0.5,1\n狗在睡觉,0.25,0\n猫吃,0.25,0\n")
    problem = load_table(path, 1.0, separator="")
    assert set(problem.space.vocabulary) == set("猫在睡觉狗吃")
    assert (problem.space.max_length, problem.space.eos) == (5, True)
    assert star(problem)["猫在睡觉"] == pytest.approx(
        0.5 * math.e / (0.5 * math.e + 0.5), abs=1e-15
    )


def test_a_json_file_states_its_own_separator(tmp_path):
    rows = [
        {"sentence": "猫在", "prob": 0.5, "reward": 0},
        {"sentence": "狗在", "prob": 0.5, "reward": 0},
    ]
    problem = load_table(
        write(
            tmp_path, json.dumps({"sentences": rows, "separator": ""}, ensure_ascii=False), "t.json"
        ),
        1.0,
    )
    assert problem.space.vocabulary == ("猫", "在", "狗")
    refused(
        tmp_path,
        json.dumps({"sentences": rows, "separator": None}),
        "separator = None is not text",
        "t.json",
    )
    refused(
        tmp_path,
        json.dumps({"sentences": rows, "seperator": ""}),
        "key 'seperator' is not known",
        "t.json",
    )


def test_a_quoted_sentence_may_hold_a_comma_and_a_line_break(tmp_path):
    problem = load_table(write(tmp_path, HEADER + '"yes, we can",0.5,1\n"two\nlines",0.5,0\n'), 1.0)
    assert sorted(star(problem)) == ["two lines", "yes, we can"]


def test_a_reward_is_ignored_where_the_prior_has_no_mass(tmp_path):
    for value in ("nan", "inf", "-inf"):
        problem = load_table(write(tmp_path, HEADER + f"a,0.5,1\nb,0.5,0\nc,0,{value}\n"), 1.0)
        assert star(problem) == pytest.approx(
            {"a": math.e / (math.e + 1), "b": 1 / (math.e + 1)}, abs=1e-15
        )


def test_minus_infinity_forbids(tmp_path):
    assert star(load_table(write(tmp_path, HEADER + "a,0.5,-inf\nb,0.5,0\n"), 1.0)) == {
        "a": 0.0,
        "b": 1.0,
    }
    rows = [
        {"sentence": "a", "prob": 0.5, "reward": "-inf"},
        {"sentence": "b", "prob": 0.5, "reward": 0},
    ]
    assert star(load_table(write(tmp_path, json.dumps(rows), "t.json"), 1.0)) == {
        "a": 0.0,
        "b": 1.0,
    }
    with pytest.raises(InfeasibleError):
        posterior(load_table(write(tmp_path, HEADER + "a,0.5,-inf\nb,0.5,-inf\n"), 1.0))


def test_weights_are_divided_by_their_sum_when_asked(tmp_path):
    path = write(tmp_path, HEADER + "a,3,0\nb,1,0\n")
    assert star(load_table(path, 1.0, normalize=True)) == pytest.approx({"a": 0.75, "b": 0.25})
    with pytest.raises(InputError, match=r"prob sum to 4, not 1.*--normalize"):
        load_table(path, 1.0)


def test_an_empty_sentence_is_a_sentence(tmp_path):
    assert star(load_table(write(tmp_path, HEADER + ",0.5,0\na,0.5,0\n"), 1.0)) == {
        "": 0.5,
        "a": 0.5,
    }


def test_ten_thousand_rows_are_read_in_a_moment(tmp_path):
    """In 0.3 s on an idle core; a quadratic reader would take minutes."""
    rows = [(f"w{i % 97} x{i // 97} y{i % 3}", i % 5) for i in range(10_000)]
    started = time.perf_counter()
    as_csv = load_table(
        write(tmp_path, HEADER + "".join(f"{s},1,{r}\n" for s, r in rows)), 1.0, normalize=True
    )
    as_json = load_table(
        write(
            tmp_path,
            json.dumps([{"sentence": s, "prob": 1, "reward": r} for s, r in rows]),
            "t.json",
        ),
        1.0,
        normalize=True,
    )
    assert time.perf_counter() - started < 10
    assert len(as_csv.prior.tokens) == len(as_json.prior.tokens) == 10_000


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            "a,-0.1,0\nb,1.1,0\n",
            r"line 2: prob = '-0.1' is not allowed; probabilities are numbers from 0 to 1",
        ),
        ("a,0.5,0\nb,nan,0\n", r"line 3: prob = 'nan' is not allowed"),
        ("a,inf,0\n", r"line 2: prob = 'inf' is not allowed"),
        ("a,1e999,0\n", r"line 2: prob = 1e999 is out of a float's range"),
        ("a,,0\n", r"line 2: prob = '' is not a number"),
        ("a,half,0\n", r"line 2: prob = 'half' is not a number.*write it like 0\.25"),
        ("a,1,good\n", r"line 2: reward = 'good' is not a number"),
        (
            "a,0.333,0\nb,0.333,0\nc,0.333,0\n",
            r"prob sum to 0\.999, not 1\. Raw weights\? Pass --normalize",
        ),
        ("a,0,0\n", r"prob sum to 0, not 1"),
        (
            "a,0.5,0\nb,0.5,nan\n",
            r"line 3: reward = nan of 'b' is not allowed; give a number, or -inf",
        ),
        ("a,0.5,inf\nb,0.5,0\n", r"line 2: reward = inf of 'a' is not allowed"),
        ("a,0.5,0\nb,0.5\n", r"line 3: 2 fields, expected 3"),
        ("a,b,0.5,0\n", r"line 2: 4 fields, expected 3.*quote a sentence that contains a comma"),
        ("", "the table has no rows"),
        ('"a,1,0\n', r"line \d+: .*check the quotes"),
        (",1,0\n", "hold no words; give at least one text"),
    ],
)
def test_bad_rows_are_refused_with_line_value_and_remedy(tmp_path, rows, message):
    refused(tmp_path, HEADER + rows, message)


def test_weights_of_nothing_cannot_be_normalised(tmp_path):
    refused(tmp_path, HEADER + "a,0,1\nb,0,1\n", "all 0", normalize=True)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("a b", "a b"),
        ("a b", "a  b"),
        ("a b", " a b "),
        ("é", unicodedata.normalize("NFD", "é")),
        ("Å", "\u212b"),
    ],
)
def test_one_sentence_twice_is_refused_with_both_places(tmp_path, first, second):
    refused(
        tmp_path,
        HEADER + f"{first},0.5,0\nx,0.25,0\n{second},0.25,0\n",
        r"line 4: sentence .* already stands at line 2; remove one, or add",
    )
    rows = [{"sentence": s, "prob": 0.5, "reward": 0} for s in (first, second)]
    refused(tmp_path, json.dumps(rows), r"entry 1: sentence .* already stands at entry 0", "t.json")


def test_spacing_counts_where_sentences_are_characters(tmp_path):
    assert (
        len(
            load_table(
                write(tmp_path, HEADER + "ab,0.5,0\na b,0.5,0\n"), 1.0, separator=""
            ).prior.tokens
        )
        == 2
    )


@pytest.mark.parametrize(
    "header",
    [
        "sentence,prob",
        "text,prob,reward",
        "sentence,reward,prob",
        "the cat,0.4,1",
        "text;prob;reward",
    ],
)
def test_a_wrong_header_is_shown_beside_the_right_one(tmp_path, header):
    refused(
        tmp_path,
        header + "\na,1,0\n",
        rf"the header is '{header}'; expected 'sentence,prob,reward'",
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty; write a header line"),
        (b"\xef\xbb\xbf", "is empty"),
        (b"PK\x03\x04\x00\x00", r"binary file \(it holds a NUL byte at 4\)"),
        (COURSE.encode("utf-16"), "binary file"),
        (
            "sentence,prob,reward\né,1,0\n".encode("latin-1"),
            r"byte 21 is not UTF-8; save the table as UTF-8",
        ),
    ],
)
def test_files_that_are_no_text_are_refused(tmp_path, content, message):
    refused(tmp_path, content, message)


def test_a_missing_file_and_a_directory_are_named(tmp_path):
    for name, reason in (("none.csv", "No such file"), ("folder.json", "directory")):
        if "folder" in name:
            (tmp_path / name).mkdir()
        with pytest.raises(
            InputError, match=rf"cannot read .*{name}: .*{reason}.*give a CSV or JSON table"
        ):
            load_table(tmp_path / name, 1.0)


def entry(**changes):
    return json.dumps([{"sentence": "a", "prob": 1, "reward": 0} | changes])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"sentence": "a", "prob": 1, "reward": NaN}]', "NaN is not JSON"),
        ('[{"sentence": "a", "prob": 1, "reward": Infinity}]', "Infinity is not JSON"),
        (
            '[{"sentence": "a", "prob": 1, "reward": -Infinity}]',
            r'-Infinity is not JSON.*write "-inf" in quotes',
        ),
        (
            '[{"sentence": "a", "prob": 1, "reward": 1e999}]',
            r"entry 0: reward = inf is out of a float's range",
        ),
        (
            '[{"sentence": "a", "prob": 1, "reward": -1e999}]',
            r"entry 0: reward = -inf is out of a float's range",
        ),
        (
            '[{"sentence": "a", "prob": 1e999, "reward": 0}]',
            r"entry 0: prob = inf is out of a float's range",
        ),
        (
            f'[{{"sentence": "a", "prob": 1, "reward": 1{"0" * 400}}}]',
            r"entry 0: reward = 1000.* is not a number a float can hold",
        ),
        (
            f'[{{"sentence": "a", "prob": 1, "reward": 1{"0" * 5000}}}]',
            "a number is too long to read",
        ),
        (
            '[{"sentence": "a", "prob": 1, "prob": 0.5, "reward": 0}]',
            "key 'prob' stands twice in one object; remove one",
        ),
        ('{"sentences": [], "sentences": []}', "key 'sentences' stands twice"),
        (
            '[{"sentence": "\\ud800", "prob": 1, "reward": 0}]',
            "entry 0: sentence holds a lone surrogate",
        ),
        (entry(prob=True), "entry 0: prob = True is not a number"),
        (entry(prob=None), "entry 0: prob = None is not a number"),
        (entry(prob=-0.5), r"entry 0: prob = -0\.5 is not allowed"),
        (entry(reward=[1]), r"entry 0: reward = \[1\] is not a number"),
        (entry(reward="nan"), r"entry 0: reward = nan of 'a' is not allowed"),
        (entry(reward="inf"), r"entry 0: reward = inf of 'a' is not allowed"),
        (entry(sentence=7), "entry 0: sentence = 7 is not text; put it in quotes"),
        (entry(extra=1), "entry 0: expected an object with the keys sentence, prob, reward"),
        ('[{"sentence": "a", "prob": 1}]', "entry 0: expected an object with the keys"),
        ('["a"]', "entry 0: expected an object with the keys sentence, prob, reward; got 'a'"),
        ("[]", "the table has no rows"),
        ("{}", r"expected a list of \{"),
        ("3", "expected a list"),
        ("", r"line 1, column 1: .*this is not JSON"),
        ('[{"sentence": "a",}]', r"line 1, column 1[0-9]: .*this is not JSON"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_bad_json_is_refused_with_entry_value_and_remedy(tmp_path, text, message):
    refused(tmp_path, text, message, "t.json")


@pytest.mark.parametrize("kl_coef", [-1.0, math.nan])
def test_the_coefficient_is_checked_here_too(tmp_path, kl_coef):
    with pytest.raises(InputError, match="kl_coef"):
        load_table(write(tmp_path, COURSE), kl_coef)


@pytest.mark.parametrize(
    ("reward", "words"), [("-1e999", "out of a float's range"), ("1_0", "without underscores")]
)
def test_a_number_that_python_reads_but_nobody_means_is_refused(reward, words, tmp_path):
    path = tmp_path / "table.csv"
    path.write_text(f"sentence,prob,reward\na,0.5,{reward}\nb,0.5,0\n", encoding="utf-8")
    with pytest.raises(InputError, match=words):
        load_table(path, 1.0)


@pytest.mark.parametrize("delimiter", [";", "\t"])
@pytest.mark.parametrize("mark", [".", ","])
def test_semicolons_and_tabs_part_fields_and_decimal_commas_are_read(tmp_path, delimiter, mark):
    lines = [line.split(",") for line in COURSE.splitlines()]
    text = "\n".join(delimiter.join(fields).replace(".", mark) for fields in lines)
    assert star(load_table(write(tmp_path, text), 1.0)) == pytest.approx(STAR, abs=1e-12)


def test_a_comma_between_thousands_is_not_guessed_at(tmp_path):
    refused(
        tmp_path,
        "sentence;prob;reward\na;1,0;1,250\n",
        r"line 2: reward = '1,250' may be read in two ways; write it with a point",
    )


def test_decimal_commas_between_commas_get_the_way_to_convert_them(tmp_path):
    refused(
        tmp_path,
        "sentence,prob,reward\na,0,4,1\n",
        r"4 fields, .* decimal comma\? Write them with a point, or part the fields by semicolons",
    )

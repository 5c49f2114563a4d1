"""Queries give what a plain Python loop over the rows gives, and nothing but queries is understood."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline import store
from pipeline.results import expression
from pipeline.results.open import open_run
from pipeline.results.predicate import Field, Predicate
from pipeline.results.query import query
from schemas.errors import SchemaError, SettingsError

FIELDS = {
    "a": Field("number"),
    "b": Field("number"),
    "name": Field("text"),
    "good": Field("truth"),
    "status": Field("number", {"fine": 0, "bad": 1}),
}
ROWS = 7
ARRAYS: dict[str, np.ndarray] = {
    "a": np.array([0.0, 1.0, -2.5, np.nan, 1e9, 3.0, 0.9]),
    "b": np.array([1.0, 1.0, 2.0, 0.0, np.nan, -3.0, 0.5], dtype="float32"),
    "name": np.array(["Au", "Ag", "Au", "", "x'y", "Au", "or"], dtype=object),
    "good": np.array([True, False, True, True, False, False, True]),
    "status": np.array([0.0, 1.0, 0.0, 1.0, 1.0, 0.0, 0.0]),
}


def _rows(text: str) -> list[int]:
    return np.flatnonzero(Predicate(text, FIELDS)(ARRAYS, ROWS)).tolist()


_VOCABULARY = [
    "a",
    "b",
    "name",
    "good",
    "status",
    "1",
    "2.5",
    "'Au'",
    "'bad'",
    "and",
    "or",
    "not",
    "in",
    "<",
    ">",
    "==",
]
_VOCABULARY += ["+", "-", "*", "/", "(", ")", "[", "]", ",", "abs", "isnan"]


# ------------------------------------------------------------------------------------------- the language


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("a > 0", [1, 4, 5, 6]),
        ("a>0 and b>0", [1, 6]),
        ("not a > 0", [0, 2, 3]),
        ("a > 0 or b > 1", [1, 2, 4, 5, 6]),
        ("a == 1 or a == 3 and b > 0", [1]),
        ("(a == 1 or a == 3) and b > 0", [1]),
        ("0 < a <= 1", [1, 6]),
        ("1 > a >= 0", [0, 6]),
        ("isnan(a)", [3]),
        ("not isnan(a) and not isnan(b)", [0, 1, 2, 5, 6]),
        ("abs(a) == 2.5", [2]),
        ("-a == 2.5", [2]),
        ("a - -a == 2", [1]),
        ("a + b * 2 == 3", [1]),
        ("(a + b) * 2 == 4", [1]),
        ("10 - 4 - 3 == 3", [0, 1, 2, 3, 4, 5, 6]),
        ("12 / 3 / 2 == 2", [0, 1, 2, 3, 4, 5, 6]),
        ("1 / 0 > 1e308", [0, 1, 2, 3, 4, 5, 6]),
        ("1 > 2", []),
        ("a / b > 1", [6]),
        ("name == 'Au'", [0, 2, 5]),
        ('name != "Au"', [1, 3, 4, 6]),
        ('name == "x\'y"', [4]),
        ("name == 'or'", [6]),
        ("name in ['Au', 'or']", [0, 2, 5, 6]),
        ("name not in ['Au', 'or']", [1, 3, 4]),
        ("a in [1, -2.5, 7]", [1, 2]),
        ("good", [0, 2, 3, 6]),
        ("good and a >= 0", [0, 6]),
        ("good == (a > 0)", [6]),
        ("status == 'bad'", [1, 3, 4]),
        ("'bad' != status", [0, 2, 5, 6]),
        ("status == 1", [1, 3, 4]),
        ("status in ['bad']", [1, 3, 4]),
        (" \n a\t>\n2 ", [4, 5]),
    ],
)
def test_known_answers(text: str, rows: list[int]) -> None:
    assert _rows(text) == rows


def test_a_stored_float32_equals_its_decimal() -> None:
    stored = {"a": np.array([0.9, 0.1], dtype="float32")}
    for text in ("a == 0.9", "a >= 0.9", "a >= 1 - 0.1", "a in [0.9]", "a >= abs(-0.9)"):
        assert Predicate(text, {"a": Field("number")})(stored, 2).tolist() == [True, False], text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the query is empty"),
        ("a >", r"character 4: 'the end' found where a name"),
        ("> a", r"character 1: '>' found"),
        ("a > 1 b", r"character 7: 'b' found where an operator or the end"),
        ("(a > 1", r"'the end' found where '\)' was expected"),
        ("a = 1", "compare with =="),
        ("a > 1 & b > 1", "write `and`"),
        ("a > 1 || b > 1", "write `or`"),
        ("~good", "write `not`"),
        ("a ^ 2 > 1", "no powers"),
        ("name == 'Au", "the string does not end"),
        ("aa > 1", r"unknown name 'aa'; did you mean 'a'\? Known names: a, b, good, name, status"),
        ("zzzzz > 1", r"unknown name 'zzzzz'\. Known names"),
        ("sqrt(a) > 1", "unknown function 'sqrt'; expected one of abs, isnan"),
        ("a", "the query gives a number; expected a condition"),
        ("name", "the query gives a text"),
        ("a > 'x'", "a number is compared with a text"),
        ("name == 1", "a text is compared with a number"),
        ("name > 'a'", "> found between texts; expected == or !="),
        ("name + name == 'a'", "a text found where a number was expected"),
        ("a and b", "a number found where a condition was expected"),
        ("not a", "a number found where a condition was expected"),
        ("abs(name) > 1", "a text found where a number was expected"),
        ("a == nan", r"write isnan\(name\)"),
        ("a in []", "a number or a string was expected"),
        ("a in [b]", "a number or a string was expected"),
        ("a in ['x']", "a number is compared with a text"),
        ("a not 3", "write `a not in"),
        ("status == 'ugly'", "'ugly' found; expected == or != and one of fine, bad"),
        ("status > 'bad'", "> 'bad' found; expected == or !="),
        ("1e999 > a", "the number 1e999 is too large"),
        ("12abc > a", "'12abc' is not understood"),
    ],
)
def test_errors_point_at_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        Predicate(text, FIELDS)


def test_an_error_shows_a_caret_below_the_place() -> None:
    with pytest.raises(SettingsError) as caught:
        Predicate("a > 1 and oops < 2", FIELDS)
    _, line, caret = str(caught.value).split("\n")
    assert line[caret.index("^")] == "o"


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')",
        "__import__('os')",
        "().__class__.__bases__[0].__subclasses__()",
        "a.__class__ == 1",
        "a.real > 0",
        "(lambda: 1)() > 0",
        "[x for x in a]",
        "a if good else b",
        "a := 3",
        "a; import os",
        "open('/etc/passwd') > 0",
        "exec('1')",
        "9**9**9 > a",
        "2 ** 100000 > a",
        "1" + "0" * 5000 + " > a",
        "a > 0x10",
        "f'{a}' == 'x'",
        "a[0] > 1",
        "abs.__globals__",
        "isnan(a)(a)",
        "'%s' % name == 'x'",
        "a > 1 # comment",
        "a > 1\\n",
        "`ls`",
        "${a} > 1",
        "{}",
    ],
)
def test_what_is_not_a_query_is_refused(text: str) -> None:
    with pytest.raises(SettingsError):
        Predicate(text, FIELDS)


@pytest.mark.parametrize(
    "text",
    [
        "(" * 3000 + "a > 1" + ")" * 3000,
        "not " * 2000 + "good",
        "-" * 9000 + "a > 1",
        "abs(" * 2000 + "a",
        "a" * 20_000,
    ],
)
def test_depth_and_length_are_bounded(text: str) -> None:
    with pytest.raises(SettingsError, match=r"nested more than 50 deep|expected at most 10000|unknown name"):
        Predicate(text, FIELDS)


@pytest.mark.parametrize("text", ["+".join(["a"] * 4000) + " > 1", " or ".join(["a > 1"] * 1000), "a<" * 4000 + "b"])
def test_long_flat_queries_are_understood(text: str) -> None:
    assert Predicate(text, FIELDS)(ARRAYS, ROWS).shape == (ROWS,)


def test_nested_comparisons_take_no_exponential_time() -> None:
    """Looking twice at the middle of each chain would take 2 to the 40 steps."""
    text = "good"
    for _ in range(40):
        text = f"(good == {text} == good)"
    assert _rows(text) == [0, 2, 3, 6]


@given(st.text(max_size=60))
@settings(max_examples=300, deadline=None)
def test_any_text_is_a_query_or_a_settings_error(text: str) -> None:
    try:
        Predicate(text, FIELDS)(ARRAYS, ROWS)
    except SettingsError:
        return
    assert text.strip()


@given(st.lists(st.sampled_from(_VOCABULARY)))
@settings(max_examples=400, deadline=None)
def test_any_words_are_a_query_or_a_settings_error(words: list[str]) -> None:
    try:
        result = Predicate(" ".join(words), FIELDS)(ARRAYS, ROWS)
    except SettingsError:
        return
    assert result.dtype == bool
    assert result.shape == (ROWS,)


# A tree of (text, oracle): the oracle computes one row with plain Python floats.

Numeric = tuple[str, Callable[[int], float]]
_NAMES = {"a": ARRAYS["a"].tolist(), "b": [float(v) for v in ARRAYS["b"]]}


def _divide(x: float, y: float) -> float:
    if y == 0:
        return math.nan if x == 0 or math.isnan(x) else math.copysign(math.inf, x) * math.copysign(1, y)
    return x / y


_NUMBER: st.SearchStrategy[Numeric] = st.recursive(
    st.sampled_from(["a"]).map(lambda n: (n, lambda i: _NAMES[n][i]))
    | st.integers(0, 9).map(lambda v: (str(v), lambda i: float(v))),
    lambda inner: st.one_of(
        inner.map(lambda p: (f"(-{p[0]})", lambda i: -p[1](i))),
        inner.map(lambda p: (f"abs({p[0]})", lambda i: abs(p[1](i)))),
        st.tuples(inner, inner).map(lambda p: (f"({p[0][0]} + {p[1][0]})", lambda i: p[0][1](i) + p[1][1](i))),
        st.tuples(inner, inner).map(lambda p: (f"({p[0][0]} - {p[1][0]})", lambda i: p[0][1](i) - p[1][1](i))),
        st.tuples(inner, inner).map(lambda p: (f"({p[0][0]} / {p[1][0]})", lambda i: _divide(p[0][1](i), p[1][1](i)))),
    ),
    max_leaves=6,
)
_TESTS: dict[str, Callable[[float, float], bool]] = {
    "<": lambda x, y: x < y, "<=": lambda x, y: x <= y, ">": lambda x, y: x > y, ">=": lambda x, y: x >= y,
    "==": lambda x, y: x == y, "!=": lambda x, y: x != y,
}  # fmt: skip
_CONDITION: st.SearchStrategy[tuple[str, Callable[[int], bool]]] = st.recursive(
    st.tuples(_NUMBER, st.sampled_from(sorted(_TESTS)), _NUMBER).map(
        lambda p: (f"{p[0][0]} {p[1]} {p[2][0]}", lambda i: _TESTS[p[1]](p[0][1](i), p[2][1](i)))
    ),
    lambda inner: st.one_of(
        inner.map(lambda p: (f"not ({p[0]})", lambda i: not p[1](i))),
        st.tuples(inner, inner).map(lambda p: (f"({p[0][0]}) and ({p[1][0]})", lambda i: p[0][1](i) and p[1][1](i))),
        st.tuples(inner, inner).map(lambda p: (f"({p[0][0]}) or ({p[1][0]})", lambda i: p[0][1](i) or p[1][1](i))),
    ),
    max_leaves=5,
)


@given(_CONDITION)
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_a_query_agrees_with_plain_python(case: tuple[str, Callable[[int], bool]]) -> None:
    text, oracle = case
    assert _rows(text) == [i for i in range(ROWS) if oracle(i)], text


def test_names_of_a_query() -> None:
    assert expression.names(expression.parse("abs(a) > b and name in ['c'] or not isnan(a)")) == {"a", "b", "name"}


# ------------------------------------------------------------------------------------------- over runs


def _column(path: Path, name: str) -> Any:
    return open_run(path)[f"columns/{name}"].values


def test_frames_are_asked_when_all_names_are_theirs(run_path: Path) -> None:
    answer = query(run_path, "column_count > 1 and snr > 2", select=["frame", "column_count", "status"])
    found = answer.to_dataframe()
    assert answer.table == "frames"
    assert found.to_dict("list") == {"frame": [3, 4], "column_count": [5, 2], "status": ["measured", "measured"]}


def test_what_was_not_computed_is_not_a_small_number(run_path: Path) -> None:
    assert query(run_path, "column_count < 3").to_dataframe()["frame"].tolist() == [1, 4]
    assert query(run_path, "species_count_Au < 3").to_dataframe()["frame"].tolist() == [1, 4]
    assert query(run_path, "isnan(column_count)").to_dataframe()["frame"].tolist() == [2, 5]


def test_status_by_name(run_path: Path) -> None:
    assert query(run_path, "status == 'dropped'").to_dataframe()["reason"].tolist() == ["all-zero frame"]
    assert query(run_path, "status in ['dropped', 'not_computed']").to_dataframe()["frame"].tolist() == [2, 5]


def test_columns_by_their_own_and_their_frames_values(run_path: Path) -> None:
    found = query(run_path, "probability > 0.6 and snr > 3.5", select=["x", "snr", "time"]).to_dataframe()
    frame, probability = _column(run_path, "frame"), _column(run_path, "probability")
    rows = [i for i in range(10) if probability[i] > 0.6 and (1.0 + frame[i]) > 3.5]
    assert found["x"].tolist() == _column(run_path, "x")[rows].tolist()
    assert found["snr"].tolist() == [1.0 + f for f in frame[rows]]
    assert found["time"].tolist() == [0.5 * f for f in frame[rows]]


def test_the_table_can_be_named(run_path: Path) -> None:
    answer = query(run_path, "snr > 4.5", table="columns")
    assert answer.to_dataframe()["frame"].tolist() == [4, 4]
    with pytest.raises(SettingsError, match="unknown name 'probability'"):
        query(run_path, "probability > 0.5", table="frames")


def test_without_a_condition_all_rows_come(run_path: Path) -> None:
    assert len(query(run_path).to_dataframe()) == 6
    assert len(query(run_path, "  ", table="columns").to_dataframe()) == 10


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 100])
def test_any_cut_gives_the_same(run_path: Path, rows: int) -> None:
    whole = query(run_path, "significance > 8 or snr < 2", table="columns").to_dataframe()
    answer = query(run_path, "significance > 8 or snr < 2", table="columns", rows=rows)
    assert max(len(batch["x"]) for batch in answer.batches()) <= rows
    assert answer.to_dataframe().equals(whole)


def test_what_is_not_needed_is_never_read(run_path: Path) -> None:
    """Damaged arrays do no harm unless they are named."""
    for file in (run_path / "columns" / "intensity" / "c").rglob("*"):
        if file.is_file():
            file.write_bytes(b"damaged")
    assert len(query(run_path, "probability > 0.6", select=["x"]).to_dataframe()) == 8
    assert len(query(run_path, "probability > 2", table="columns").to_dataframe()) == 0
    with pytest.raises(Exception, match=r"(?i)checksum|damaged|shard|size|decod"):
        query(run_path, "intensity > 0", select=["x"]).to_dataframe()


def test_select_takes_all_species(run_path: Path) -> None:
    names = query(run_path, "snr > 1", select=["species_count"]).names
    assert names == ("species_count_Au", "species_count_unknown")


def test_select_names_the_nearest(run_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"select: unknown name 'probabilty'; did you mean 'probability'\?"):
        query(run_path, "snr > 1", select=["probabilty"])


def test_several_runs_get_a_movie_column(make_run: Callable[..., Path], tmp_path: Path) -> None:
    make_run("b", seed=2)
    make_run("a", counts=(1, 2), seed=3)
    for runs in (tmp_path, [tmp_path / "a.zarr", tmp_path / "b.zarr"]):
        answer = query(runs, "column_count > 1", select=["column_count"])
        assert answer.names == ("movie", "column_count")
        found = answer.to_dataframe()
        assert list(zip(found["movie"], found["column_count"], strict=True)) == [("a", 2), ("b", 3), ("b", 5), ("b", 2)]


def test_every_run_is_checked_before_anything_is_read(make_run: Callable[..., Path], tmp_path: Path) -> None:
    good, bad = make_run("good"), make_run("late")
    shutil.rmtree(bad / "columns")
    with pytest.raises(SchemaError, match=r"late\.zarr has no /columns yet"):
        query([good, bad], "snr > 1")


def test_a_missing_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(SchemaError, match="absent"):
        query(tmp_path / "absent.zarr", "snr > 1")
    with pytest.raises(SettingsError, match="no run was given"):
        query([], "snr > 1")


def test_an_empty_table_answers_empty(make_run: Callable[..., Path]) -> None:
    path = make_run("noise", counts=(0, 0))
    found = query(path, "probability > 0").to_dataframe()
    assert len(found) == 0
    assert "x" in found.columns


def test_a_class_with_an_odd_name_stays_one_name(make_run: Callable[..., Path]) -> None:
    path = make_run("odd")
    group = store.open_tree(path)["frames"].to_dataset()
    assert list(group["species_class"].values) == ["Au", "unknown"]
    from pipeline.results.query import _flat

    renamed = group.assign_coords(species_class=["O 2-", "__class__"])
    assert {"species_count_O_2_", "species_count___class__"} <= set(_flat(renamed, "time"))


def test_particles_are_a_table_of_their_own(run_path: Path) -> None:
    every = query(run_path, table="particles")
    assert every.names[:3] == ("frame", "y", "x")
    assert len(every.to_dataframe()) == 8
    # Names that only particles have say which table is meant; what /frames says of their frame may be used too.
    chosen = query(run_path, "area >= 1 and contact in ['free', 'border'] and snr > 1.5")
    table = chosen.to_dataframe()
    assert chosen.table == "particles" and set(table["contact"]) <= {"free", "border"} and 0 < len(table) < 8
    assert query(run_path, "interpretable == 'yes'").table == "frames"


def test_runs_of_before_particles_can_still_be_asked(run_path: Path) -> None:
    shutil.rmtree(run_path / "particles")
    assert len(query(run_path, table="columns").to_dataframe()) == 10
    with pytest.raises(SchemaError, match="no /particles"):
        query(run_path, table="particles")

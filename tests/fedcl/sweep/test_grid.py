"""What a sweep varies, as written: alternatives, intervals, seeds, a file's section, names of folders."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcl.errors import UsageError
from fedcl.sweep.grid import (
    Axis,
    Range,
    Section,
    alternatives,
    combinations,
    parse_request,
    parse_section,
    parse_seeds,
    same,
)
from fedcl.sweep.names import LONGEST, name_variants

scalars = (
    st.none() | st.booleans() | st.integers(-999, 999) | st.sampled_from(["a", "b-c", "holdout(0.2)", "x, y", "[", "'"])
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("pq"), inner)
)


@given(st.lists(values, min_size=1, max_size=5, unique_by=lambda value: json.dumps(value)))
@settings(max_examples=60, deadline=None)
def test_every_list_of_values_can_be_written_and_read_back(listed: list[Any]) -> None:
    # JSON is YAML, so it is one way to write any value.
    text = "options.x.y=" + ",".join(json.dumps(value) for value in listed)
    request = parse_request([text], Section())
    if len(listed) == 1:
        assert request.fixed == (text,)
    else:
        assert [axis.values for axis in request.axes] == [tuple(listed)]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("finetune,[fedlwf,supcon]", ["finetune", "[fedlwf,supcon]"]),
        ("[],[crop, flip]", ["[]", "[crop, flip]"]),
        ("global,holdout(0.2)", ["global", "holdout(0.2)"]),
        ("{a: 1, b: [2, 3]}", ["{a: 1, b: [2, 3]}"]),
        ("'a,b',c", ["'a,b'", "c"]),
        ("it's,fine", ["it's", "fine"]),
        (" 1 , 2 ", ["1", "2"]),
    ],
)
def test_commas_in_brackets_and_quotes_do_not_separate(text: str, parts: list[str]) -> None:
    assert alternatives("key", text) == parts


@pytest.mark.parametrize("text", ["[a", "a]", "(a]", "'a", "a,,b", ",a", "a,"])
def test_what_makes_no_sense_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="key="):
        alternatives("key", text)


@given(st.lists(st.integers(0, 50), min_size=1, max_size=6, unique=True))
def test_seeds_read_what_is_written(seeds: list[int]) -> None:
    assert parse_seeds(",".join(map(str, seeds))) == seeds
    assert parse_seeds(seeds) == seeds
    assert parse_seeds(f"{min(seeds)}-{max(seeds)}") == list(range(min(seeds), max(seeds) + 1))


@pytest.mark.parametrize("text", ["", "a", "-1", "3-1", "1,1", "0-4,2", "1.5", "0-99999", "²"])
def test_seeds_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--seeds="):
        parse_seeds(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("optimiser.lr=0.01..0.5:log", Range("optimiser.lr", 0.01, 0.5, True, False)),
        ("federation.rounds=1..9", Range("federation.rounds", 1, 9, False, True)),
        ("options.a.b=-1e-3..1", Range("options.a.b", -0.001, 1, False, False)),
    ],
)
def test_intervals(text: str, expected: Range) -> None:
    assert parse_request([text], Section()).ranges == (expected,)


@pytest.mark.parametrize("text", ["data.root=../images", "data.root=a..b", "init=../runs/x@task0"])
def test_paths_are_no_intervals(text: str) -> None:
    assert parse_request([text], Section()).fixed == (text,)


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (["optimiser.lr=0.5..0.1"], "must rise"),
        (["optimiser.lr=0..1:log"], "must start above 0"),
        (["optimiser.lr=0.1,0.10"], "is given twice"),
        (["optimiser.lr=0.1", "optimiser.lr=0.2"], "is given twice"),
        (["seed=1,2"], "use --seeds"),
        (["name=a,b"], "one name"),
        (["optimiser.lr"], "must be key=value"),
        (["optimiser.lr=0.1,zwei"], None),
    ],
)
def test_messages(texts: list[str], said: str | None) -> None:
    if said is None:  # a value of the wrong type is found when settings are loaded
        assert parse_request(texts, Section()).axes[0].values == (0.1, "zwei")
        return
    with pytest.raises(UsageError, match=re.escape(said)):
        parse_request(texts, Section())


def test_true_is_not_one() -> None:
    assert Axis("a", (1, True, 1.0, "1")).values == (1, True, 1.0, "1")
    assert not same([1], [True])


def test_a_file_lists_runs_and_a_grid_and_the_command_line_replaces_keys() -> None:
    section = parse_section(
        {
            "seeds": "0-1",
            "grid": {"optimiser.lr": [0.1, 0.2], "federation.rounds": [1, 2]},
            "runs": [
                {"name": "weak", "strategy": "fedprox", "options": {"fedprox": {"mu": 0.1}}},
                {"strategy": "finetune"},
            ],
        }
    )
    request = parse_request(["optimiser.lr=0.3", "federation.epochs=1,2"], section)
    assert request.fixed == ("optimiser.lr=0.3",)
    assert [axis.key for axis in request.axes] == ["federation.rounds", "federation.epochs"]
    assert request.runs[0] == {"name": "weak", "strategy": "fedprox", "options.fedprox.mu": 0.1}
    found = combinations(request.runs, request.axes)
    assert len(found) == 2 * 2 * 2
    assert found[1].settings == {
        "strategy": "fedprox", "options.fedprox.mu": 0.1, "federation.rounds": 1, "federation.epochs": 2,
    }  # fmt: skip
    assert found[1].called == {"name": "weak", "federation.rounds": 1, "federation.epochs": 2}
    assert found[-1].called is None


@pytest.mark.parametrize(
    ("section", "overrides", "said"),
    [
        ({"gird": {}}, [], "sweep.gird"),
        ({"grid": {"optimiser.lr": 0.1}}, [], "must be a list"),
        ({"grid": {"optimiser.lr": []}}, [], "must be a list"),
        ({"runs": [{"seed": 1}]}, [], "use --seeds"),
        ({"runs": [{"optimiser.lr": 1, "optimiser": {"lr": 2}}]}, [], "is given twice"),
        ({"runs": [{"optimiser.lr": 1}]}, ["optimiser.lr=2"], "is set by an entry of sweep.runs too"),
        ([1], [], "sweep"),
    ],
)
def test_messages_about_a_section(section: Any, overrides: list[str], said: str) -> None:
    with pytest.raises(UsageError, match=re.escape(said)):
        parse_request(overrides, parse_section(section))


KEYS = ["strategy", "optimiser.lr", "model.name", "options.a.mu", "options.b.mu"]


@given(
    st.lists(
        st.dictionaries(st.sampled_from(KEYS), values),
        min_size=1, max_size=6, unique_by=lambda settings: json.dumps(settings, sort_keys=True),
    )
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_names_are_unique_and_safe_on_every_file_system(variants: list[dict[str, Any]]) -> None:
    names = name_variants(variants, "base")
    assert len({name.casefold() for name in names}) == len(names)
    assert all(re.fullmatch(r"[A-Za-z0-9_+=@][A-Za-z0-9_.+=@,~-]*", name) for name in names)
    assert all(len(name) <= LONGEST + 9 for name in names)
    assert names == name_variants(variants, "base")


def test_names_that_differ_in_case_alone_are_told_apart() -> None:
    upper, lower = name_variants([{"data.name": "Digits"}, {"data.name": "digits"}], "")
    assert upper == "data=Digits"
    assert re.fullmatch(r"data=digits~[0-9a-f]{8}", lower)

"""Settings: what loads, what composes, and one clear line for everything that is wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcl.config import Config, config_hash, load_config, parse_options, to_yaml
from fedcl.errors import UsageError


def refused(*overrides: str, source: Any = None) -> str:
    with pytest.raises(UsageError) as caught:
        load_config({} if source is None else source, list(overrides))
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_defaults_are_valid_and_train_one_epoch() -> None:
    config = load_config({})
    assert (config.federation.epochs, config.federation.steps) == (1, None)
    assert config.strategy == ["finetune"]


def test_overrides_are_yaml() -> None:
    texts = ["federation.clients=10", "optimiser.lr=1e-3", "data.root=null", "strategy=[fedlwf, supcon]"]
    config = load_config({}, [*texts, "data.augment=flip", "options.fedlwf.weight=3", "federation.drop_last=true"])
    assert config.federation.clients == 10
    assert config.optimiser.lr == 1e-3
    assert config.data.root is None
    assert config.strategy == ["fedlwf", "supcon"]
    assert config.data.augment == ["flip"]
    assert config.options == {"fedlwf": {"weight": 3}}
    assert config.federation.drop_last is True


def test_names_and_paths_are_taken_as_typed() -> None:
    config = load_config({}, ["name=007", "output.dir=a #b: c", "data.root=1e3"])
    assert (config.name, config.output.dir, config.data.root) == ("007", "a #b: c", "1e3")


def test_mappings_and_pairs_are_overrides_too_and_stay_untouched() -> None:
    section = {"clients": 3}
    config = load_config({}, {"federation": section, "federation.rounds": 2, "seed": 4})
    assert (config.federation.clients, config.federation.rounds, config.seed) == (3, 2, 4)
    assert section == {"clients": 3}
    assert load_config({}, ["federation.clients=3", ("federation.rounds", 2), ("seed", 4)]) == config
    assert load_config(config) == config


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("federation.clinets=3", ["federation.clinets=3", "'federation.clients'"]),
        ("federatoin.clients=3", ["federatoin", "'federation'"]),
        ("federation.clients=2.5", ["federation.clients=2.5", "whole number"]),
        ("federation.clients='3'", ["federation.clients='3'", "whole number"]),
        ("federation.clients=true", ["federation.clients=True", "whole number"]),
        ("federation.clients=0", ["federation.clients=0", "at least 1"]),
        ("federation.rounds=0", ["federation.rounds=0"]),
        ("federation.participation=0", ["(0, 1]"]),
        ("federation.participation=1.01", ["(0, 1]"]),
        ("federation.weighting=sample", ["samples, uniform", "'samples'"]),
        ("federation.batch_size=0", ["at least 1"]),
        ("federation.batch_min=99", ["federation.batch_size=32"]),
        ("federation.drop_last=1", ["true or false"]),
        ("federation=3", ["mapping"]),
        ("federation=null", ["mapping"]),
        ("federation.clients.x=1", ["federation.clients", "whole number"]),
        ("data.validation=1", ["[0, 1)"]),
        ("data.validation=-0.1", ["[0, 1)"]),
        ("data.size=0", ["at least 1"]),
        ("data.augment=null", ["list"]),
        ("data.augment=[1]", ["data.augment[0]=1", "text"]),
        ("data.name=???", ["must be given"]),
        ("partition.alpha=0", ["above 0"]),
        ("partition.alpha=.inf", ["finite"]),
        ("partition.alpha=.nan", ["finite"]),
        ("partition.alpha=1e999", ["finite"]),
        ("partition.test=same", ["holdout(p)", "'same_mix'"]),
        ("partition.test=holdout(1)", ["0 < p < 1"]),
        ("partition.test=holdout(x)", ["0 < p < 1"]),
        ("optimiser.lr=0", ["above 0"]),
        ("optimiser.momentum=1", ["[0, 1)"]),
        ("optimiser.betas=[0.9]", ["two numbers"]),
        ("optimiser.schedule=step", ["optimiser.milestones"]),
        ("optimiser.milestones=[3]", ["schedule=step"]),
        ("engine.dtype=float16", ["float32, float64, bf16"]),
        ("engine.path=stakced", ["'stacked'"]),
        ("engine.device=gpu", ["cuda:N"]),
        ("engine.device=cuda:x", ["cuda:N"]),
        ("engine.threads=-1", ["at least 0"]),
        ("scenario.order=given", ["scenario.classes"]),
        ("scenario.classes=[1,2]", ["scenario.order"]),
        ("seed=-1", ["at least 0"]),
        ("seed=9223372036854775808", ["2**63"]),
        ("name=a/b", ["no slash"]),
        ("name=..", ["dot"]),
        ("name=", ["name=''"]),
        ("strategy=[]", ["at least one"]),
        ("strategy=[a,a]", ["twice"]),
        ("options=3", ["mapping"]),
        ("options.a=3", ["options.a=3", "mapping"]),
        ("seed", ["override='seed'", "key=value"]),
        ("=3", ["key=value"]),
        ("seed=", ["no value"]),
        ("seed=[1", ["no valid YAML"]),
        ("name=${nope}", ["name='${nope}'", "nope"]),
        ("name=${a b", ["name='${a b'"]),
        ("federation.clients=${optimiser.lr}", ["federation.clients", "0.05"]),
    ],
)
def test_every_wrong_setting_is_one_clear_line(override: str, parts: list[str]) -> None:
    text = refused(override)
    for part in parts:
        assert part in text


def test_a_key_given_twice_is_refused() -> None:
    assert "twice" in refused("seed=1", "seed=1")
    assert "in parts" in refused("federation.clients=3", "federation={rounds: 2}")
    assert "as a whole" in refused("data=3", "data.name=mnist")


def test_epochs_and_steps() -> None:
    assert "exactly one" in refused("federation.epochs=1", "federation.steps=1")
    config = load_config({"federation": {"epochs": 3}}, ["federation.steps=7"])
    assert (config.federation.epochs, config.federation.steps) == (None, 7)
    config = load_config({"federation": {"steps": 3}}, ["federation.epochs=7"])
    assert (config.federation.epochs, config.federation.steps) == (7, None)


def test_a_higher_layer_that_changes_the_stack_drops_the_options_of_what_it_leaves_out() -> None:
    low = {"strategy": ["a", "b"], "options": {"a": {"x": 1}, "b": {"y": 2}}}
    assert load_config(low, ["strategy=[b]"]).options == {"b": {"y": 2}}
    assert load_config(low, ["options.b.y=3"]).options == {"a": {"x": 1}, "b": {"y": 3}}
    assert load_config(low, ["options.a=null"]).options == {"b": {"y": 2}}
    # The same layer names both: nothing is dropped, it is for the check of names to refuse.
    assert load_config({}, ["strategy=[b]", "options.a.x=1"]).options == {"a": {"x": 1}}


def test_interpolations_are_resolved() -> None:
    config = load_config({"name": "run-${seed}", "evaluate": {"every": "${federation.rounds}"}}, ["seed=4"])
    assert (config.name, config.evaluate.every) == ("run-4", config.federation.rounds)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"", "empty"),
        (b"# only a comment\n", "empty"),
        (b"- a\n- b\n", "list"),
        (b"5", "no YAML mapping"),
        (b"seed: [1", "line"),
        (b"seed: 1\nseed: 2\n", "duplicate key seed"),
        (b"\xff\xfe\x00", "no text file"),
        (b"\x00", "no YAML"),
        (b"seed: 1\n2: 3\n", "no such key"),
        (b"seed: '1'\n", "whole number"),
        (b"name: 1\n", "quotes"),
        (b"data:\n", "mapping"),
        (b"seed: !!python/object/apply:os.getcwd []\n", "no valid YAML"),
        (b"a: &x [*x]\n", "recursive"),
    ],
)
def test_broken_files_are_one_line_that_names_the_file(tmp_path: Path, content: bytes, part: str) -> None:
    file = tmp_path / "broken.yaml"
    file.write_bytes(content)
    text = refused(source=file)
    assert part in text
    assert "broken.yaml" in text


def test_folders_and_missing_files(tmp_path: Path) -> None:
    assert "folder" in refused(source=tmp_path)
    (tmp_path / "config.yaml").write_text("seed: 1")
    assert "fedcl resume" in refused(source=tmp_path)
    (tmp_path / "digits5.yaml").write_text("seed: 1")
    with pytest.raises(UsageError, match="Did you mean 'digits5'") as caught:
        load_config("digist5", search=[tmp_path])
    assert caught.value.key == "CONFIG"


def test_presets_compose_in_order(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("# first\nseed: 1\nfederation: {clients: 2, rounds: 2}\n")
    (tmp_path / "b.yaml").write_text("presets: a\nfederation: {clients: 3}\n")
    (tmp_path / "protocols").mkdir()
    (tmp_path / "protocols" / "p.yaml").write_text("scenario: {tasks: 3}\n")
    (tmp_path / "c.yaml").write_text("presets: [a, b, protocols/p]\nname: c\n")
    config = load_config("c", search=[tmp_path])
    assert (config.name, config.seed) == ("c", 1)
    assert (config.federation.clients, config.federation.rounds, config.scenario.tasks) == (3, 2, 3)
    config = load_config({}, ["seed=9", "preset=b", "protocol=p"], search=[tmp_path])
    assert (config.seed, config.federation.clients, config.scenario.tasks) == (9, 3, 3)


def test_presets_by_path_start_at_their_file(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "low.yaml").write_text("seed: 5\nplugins: [mine.py]\n")
    (tmp_path / "top.yaml").write_text("presets: [sub/low.yaml]\n")
    config = load_config(tmp_path / "top.yaml")
    assert config.seed == 5
    assert config.plugins == [str(tmp_path / "sub" / "mine.py")]
    (tmp_path / "top.yaml").write_text("presets: [sub/lwo.yaml]\n")
    assert "top.yaml" in refused(source=tmp_path / "top.yaml")


def test_a_circle_of_presets_is_refused_with_its_chain(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("presets: [b]\nseed: 1\n")
    (tmp_path / "b.yaml").write_text("presets: [a]\nseed: 1\n")
    with pytest.raises(UsageError, match=r"a\.yaml -> b\.yaml -> a\.yaml"):
        load_config("a", search=[tmp_path])


def test_a_preset_wins_over_a_folder_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "place").mkdir()
    (tmp_path / "place" / "mine.yaml").write_text("seed: 8\n")
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    assert load_config("mine", search=[tmp_path / "place"]).seed == 8


WORDS = st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z"), exclude_characters="$"), min_size=1)


@settings(max_examples=60, deadline=None)
@given(
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | WORDS,
        lambda inner: st.lists(inner, max_size=3),
        max_leaves=5,
    ),
    text=WORDS,
)
def test_written_settings_load_as_equal(tmp_path_factory: pytest.TempPathFactory, value: Any, text: str) -> None:
    config = load_config({}, {"options": {"finetune": {"x": value}}, "data.root": text, "optimiser.lr": 1e-7})
    file = tmp_path_factory.mktemp("yaml") / "config.yaml"
    file.write_text(to_yaml(config), encoding="utf-8")
    assert load_config(file) == config


def test_hash_names_what_decides_the_numbers(tmp_path: Path) -> None:
    base = config_hash(load_config({}))
    for same in ("name=x", "output.dir=y", "engine.device=cpu", "federation.epochs=1"):
        assert config_hash(load_config({}, [same])) == base
    for other in ("seed=1", "optimiser.lr=0.1", "strategy=[fedprox]", "options.finetune.x=1"):
        assert config_hash(load_config({}, [other])) != base
    plugin = tmp_path / "p.py"
    plugin.write_text("a = 1")
    with_plugin = load_config({}, {"plugins": [str(plugin)]})
    first = config_hash(with_plugin)
    plugin.write_text("a = 2")
    assert config_hash(with_plugin) != first


@dataclass(frozen=True)
class Options:
    weight: float = 1.0
    count: int = 2
    mode: Literal["mean", "sum"] = "mean"
    limit: int | None = None
    shares: tuple[float, ...] = ()
    pair: tuple[int, int] = (1, 2)
    names: list[str] = field(default_factory=list)
    either: float | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        if self.weight < 0:
            raise ValueError("weight must be at least 0,\nor 0 to switch the term off")


def test_options_are_typed() -> None:
    given_ = {
        "weight": 3,
        "limit": 4,
        "shares": [1, 0.5],
        "pair": [3, 4],
        "names": "a",
        "either": 2,
        "mode": "sum",
    }
    options = parse_options(Options, given_, "options.x")
    assert options == Options(3.0, 2, "sum", 4, (1.0, 0.5), (3, 4), ["a"], 2.0)
    assert type(options.weight) is float
    assert parse_options(Options, {}, "options.x") == Options()


@pytest.mark.parametrize(
    ("given_", "parts"),
    [
        ({"wieght": 1}, ["options.x.wieght=1", "'options.x.weight'"]),
        ({"weight": "a"}, ["options.x.weight='a'", "finite number"]),
        ({"weight": float("nan")}, ["finite"]),
        ({"weight": -1}, ["options.x=", "at least 0, or 0"]),
        ({"count": 1.5}, ["options.x.count=1.5", "whole number"]),
        ({"mode": "sums"}, ["mean, sum", "'sum'"]),
        ({"limit": "a"}, ["whole number, or null"]),
        ({"shares": [1, "b"]}, ["options.x.shares[1]='b'"]),
        ({"pair": [1]}, ["2 values"]),
        ({"either": "off"}, ["number", "auto"]),
    ],
)
def test_wrong_options_name_the_option(given_: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        parse_options(Options, given_, "options.x")
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


def test_loading_settings_imports_nothing_heavy() -> None:
    code = (
        "import sys; from fedcl.config import load_config; load_config({}, ['seed=1']);"
        "print([m for m in ('torch', 'flwr', 'avalanche', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ))
    assert done.stdout.strip() == "[]", done.stderr


def test_schema_defaults_are_what_an_empty_source_gives() -> None:
    expected = Config()
    expected.federation.epochs = 1
    assert load_config({}) == expected

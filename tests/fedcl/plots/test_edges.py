"""Plots of runs at the edges: undefined values, missing and damaged files, very many tasks, classes and methods."""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from fedcl.errors import RunFailed, UsageError
from fedcl.plots import KINDS, draw
from fedcl.records.runs import Run, as_run

METHODS = [name for name, kind in KINDS.items() if kind.shows == "methods"]
Clashes = Callable[[Figure], list[str]]


def texts(figure: Figure) -> list[str]:
    return [
        text.get_text().replace("\N{NO-BREAK SPACE}", " ").replace("\n", " ") for text in figure.legends[0].get_texts()
    ]


def test_undefined_values_are_marked(one: Run, tmp_path: Path) -> None:
    copy = shutil.copytree(one.folder, tmp_path / "run")
    rows = [["0.5", "", "0.1"], ["0.25", "", "0.2"], ["0.75", "", "0.5"]]
    (copy / "accuracy_matrix.csv").write_text("".join(",".join(row) + "\n" for row in rows))
    summary = json.loads((copy / "summary.json").read_text())
    (copy / "summary.json").write_text(json.dumps({**summary, "bytes_up": None, "bytes_down": None}))
    run = as_run(copy)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert texts(draw("accuracy", [run])) == ["finetune (undefined after 2, 3 tasks)"]
        assert {patch.get_hatch() for patch in draw("matrix", [run]).axes[0].patches} == {"////"}
        assert draw("forgetting", [run]).axes[0].lines[0].get_xdata().tolist() == [1]
        assert texts(draw("bytes", [run]))[0].endswith("(sends nothing)")
        assert draw("costs", [run]).axes[0].texts[0].get_text() == "n/a"


NEEDS = {
    "clients": ("client_accuracy.csv", r"partition\.test=same_mix"),
    "features": ("features", r"evaluate\.features="),
    "probes": ("probes.csv", r"evaluate\.probes="),
    "drift": ("probes.csv", r"evaluate\.probes="),
}


@pytest.mark.parametrize("kind", NEEDS)
def test_what_was_not_recorded_is_named_with_its_setting(kind: str, one: Run, tmp_path: Path) -> None:
    name, setting = NEEDS[kind]
    copy = shutil.copytree(one.folder, tmp_path / "run")
    shutil.rmtree(copy / name) if (copy / name).is_dir() else (copy / name).unlink()
    with pytest.raises(RunFailed, match=setting) as caught:
        draw(kind, [as_run(copy)])
    assert "\n" not in str(caught.value)
    assert str(copy) in str(caught.value)


@pytest.mark.parametrize("name", ["client_accuracy.csv", "class_accuracy.csv", "probes.csv"])
def test_damaged_tables_are_named(name: str, one: Run, tmp_path: Path) -> None:
    copy = shutil.copytree(one.folder, tmp_path / "run")
    (copy / name).write_text((copy / name).read_text()[:-9] + "x,y,z\n")
    kind = {"client_accuracy.csv": "clients", "class_accuracy.csv": "forgetting", "probes.csv": "probes"}[name]
    with pytest.raises(RunFailed, match=name.replace(".", r"\.")):
        draw(kind, [as_run(copy)])


@pytest.mark.parametrize(("tasks", "classes", "clients"), [(100, 100, 20), (20, 100, 100), (1, 2, 1)])
def test_any_size_can_be_read(
    tasks: int, classes: int, clients: int, made: Callable[..., Run], clashes: Clashes
) -> None:
    run = made("x", tasks, classes, clients)
    for kind in ("accuracy", "matrix", "forgetting", "clients", "bytes", "drift", "probes", "costs"):
        if tasks == 1 and kind in ("forgetting", "drift"):
            with pytest.raises(RunFailed, match="two tasks"):
                draw(kind, [run])
            continue
        figure = draw(kind, [run])
        assert clashes(figure) == [], kind
        assert figure.get_figwidth() <= 7.0


def test_many_methods_with_long_names_fit(made: Callable[..., Run], clashes: Clashes) -> None:
    stacks = [("finetune",), ("fedlwf", "nearest_mean", "supcon", "weight_aligning", "fedprox", "fedewc", "replay")]
    stacks += [("replay", *stacks[1][:count]) for count in range(1, 6)]
    runs = [made(f"m{i}", 20, 100, 20, strategy=stack) for i, stack in enumerate(stacks)]
    for kind in METHODS:
        figure = draw(kind, runs)
        assert clashes(figure) == [], kind
        assert figure.get_figwidth() <= 7.0
    strips = draw("forgetting", runs).axes[1].collections[0].get_array()
    assert strips.shape == (7, 100)
    assert strips.mask[:, 95:].all()
    assert not strips.mask[:, :95].any()


def test_wrong_requests(one: Run, everything: tuple[Run, ...]) -> None:
    with pytest.raises(UsageError, match="Did you mean 'features'"):
        draw("feature", [one])
    with pytest.raises(UsageError, match="no finished run"):
        draw("accuracy", [])
    with pytest.raises(UsageError, match="draws one run"):
        draw("features", everything)
    with pytest.raises(UsageError, match=r"options\.replay\.budget"):
        draw("memory", [one])

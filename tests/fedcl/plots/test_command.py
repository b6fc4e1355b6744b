"""``fedcl plot``: where pictures go, in which formats, and what is said of runs that are left out."""

import json
import shutil
from pathlib import Path

import pytest
from matplotlib import image

from fedcl.commands.cli import run_command_line
from fedcl.errors import RunFailed, UsageError
from fedcl.plots import KINDS
from fedcl.plots.command import plot_folders

STARTS = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}


@pytest.fixture
def copied(real: Path, tmp_path: Path) -> Path:
    """The real runs in a folder that a test may change."""
    return shutil.copytree(real, tmp_path / "runs")


def test_pictures_lie_beside_what_they_show(copied: Path) -> None:
    run, both = copied / "finetune" / "seed-0", copied / "finetune"
    assert plot_folders("accuracy", [run]).paths == (run / "plots/accuracy.png", run / "plots/accuracy.svg")
    assert plot_folders("accuracy", [both], formats="png").paths == (both / "plots/accuracy.png",)
    drawn = plot_folders("features", [both], formats="png")
    assert drawn.paths == tuple(both / f"seed-{seed}" / "plots" / "features.png" for seed in (0, 1))
    assert drawn.notes == ()
    assert image.imread(drawn.paths[0]).shape[1] > 1000


@pytest.mark.parametrize(
    ("out", "formats", "names"),
    [
        ("fig.pdf", None, ["fig.pdf"]),
        ("fig", None, ["fig.png", "fig.svg"]),
        ("fig.png", "svg,pdf", ["fig.svg", "fig.pdf"]),
        ("v1.2", "png", ["v1.2.png"]),
        ("new/fig.svg", None, ["fig.svg"]),
    ],
)
def test_out_and_format(out: str, formats: str | None, names: list[str], copied: Path, tmp_path: Path) -> None:
    paths = plot_folders("bytes", [copied], out=tmp_path / out, formats=formats).paths
    assert [path.name for path in paths] == names
    assert all(path.read_bytes().startswith(STARTS[path.suffix[1:]]) for path in paths)


def test_broken_runs_are_left_out_and_named(copied: Path) -> None:
    summary = copied / "small" / "seed-0" / "summary.json"
    summary.write_text(summary.read_text()[:100])
    shutil.copytree(copied / "finetune" / "seed-1", copied / "again" / "seed-1")
    drawn = plot_folders("accuracy", [copied], formats="svg")
    assert len(drawn.notes) == 2
    assert "small" in drawn.notes[0]
    assert "damaged" in drawn.notes[0]
    assert "is the same run as" in drawn.notes[1]
    with pytest.raises(RunFailed, match="damaged"):
        plot_folders("accuracy", [copied / "small"])


def test_other_protocols_and_old_runs_are_noted(copied: Path) -> None:
    for run in copied.glob("*/seed-*"):
        (run / "class_accuracy.csv").unlink()
    config = copied / "large" / "seed-0" / "config.yaml"
    config.write_text(config.read_text().replace("alpha: 1.0", "alpha: 2.0"))
    notes = plot_folders("forgetting", [copied], formats="svg").notes
    assert len(notes) == 2
    assert notes[0].endswith("they differ in partition.alpha")
    assert "no forgetting by class" in notes[1]


@pytest.mark.parametrize(
    ("kind", "arguments", "named"),
    [
        ("acuracy", {}, "Did you mean 'accuracy'"),
        ("accuracy", {"formats": "jpg"}, "--format='jpg'"),
        ("accuracy", {"formats": ""}, "--format=''"),
        ("accuracy", {"out": Path("fig.jpg")}, "--out='fig.jpg'"),
        ("features", {"out": Path("fig.png")}, "draws each run apart"),
        ("features", {"method": "umap"}, "--method='umap'"),
        ("accuracy", {"method": "tsne"}, "is for features"),
        ("accuracy", {"key": "seed"}, "is for memory"),
        ("memory", {"key": "options.replay.nothing"}, "--key='options.replay.nothing'"),
        ("accuracy", {"by": "stratgy"}, "Did you mean 'strategy'"),
    ],
)
def test_wrong_use_is_one_line(kind: str, arguments: dict, named: str, real: Path) -> None:
    before = sorted(real.rglob("*"))
    with pytest.raises(UsageError, match=r"^[^\n]*$") as caught:
        plot_folders(kind, [real], **arguments)
    assert named in str(caught.value)
    assert sorted(real.rglob("*")) == before


def test_command_line(copied: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "fig.svg"
    arguments = ["plot", "memory", str(copied), "--out", str(out), "--title", "Budget and $5"]
    assert run_command_line(arguments) == 0
    assert capfd.readouterr().out == f"{out}\n"
    assert "Budget and $5</text>" in out.read_text()
    assert run_command_line(["list", "plots", "--json"]) == 0
    listed = json.loads(capfd.readouterr().out)
    assert [row["name"] for row in listed] == list(KINDS)
    assert all(row["summary"] for row in listed)

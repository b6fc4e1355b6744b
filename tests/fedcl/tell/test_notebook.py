"""Results as frames and pictures, and progress below a notebook's cell."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest

import fedcl
from fedcl.errors import UsageError
from fedcl.records.frames import matrix_frame
from fedcl.tell.notebook import NotebookProgress, in_notebook, notebook_progress
from fedcl.tell.progress import QuietProgress, Standing

if TYPE_CHECKING:
    from fedcl.run import RunResult

Tiny = Callable[[Mapping[str, Any]], "RunResult"]


def test_the_matrix_as_a_frame(tiny: Tiny) -> None:
    pytest.importorskip("pandas")
    result = tiny({})
    frame = result.frame()
    assert frame.shape == (2, 2)
    assert frame.loc[2, 1] == result.matrix[1][0]
    assert frame.loc[2].mean() == pytest.approx(result.summary["average_accuracy"])
    undefined = matrix_frame([[0.5, None]])
    assert math.isnan(undefined.loc[1, 2])


def test_rounds_as_a_frame(tiny: Tiny) -> None:
    pytest.importorskip("pandas")
    result = tiny({"evaluate.every": 2})
    frame = result.rounds_frame()
    assert list(frame.index) == [(1, 1), (1, 2), (2, 1), (2, 2)]
    assert frame["bytes_up"].sum() == result.summary["bytes_up"]
    assert frame["accuracy_seen"].notna().tolist() == [False, True, False, True]
    assert (frame["loss"] == frame["loss.task"]).all()


def test_summaries_of_several_runs_as_a_frame(tiny: Tiny, tmp_path: Path) -> None:
    pytest.importorskip("pandas")
    one = tiny({"output.dir": str(tmp_path / "all"), "name": "one"})
    two = tiny({"output.dir": str(tmp_path / "all"), "name": "two", "strategy": ["fedprox"]})
    torn = tmp_path / "all" / "torn" / "seed-0"
    torn.mkdir(parents=True)
    (torn / "config.yaml").write_text("name: torn\n")
    with pytest.warns(UserWarning, match=r"torn.*is left out"):
        frame = fedcl.frames(tmp_path / "all")
    assert frame["strategy"].tolist() == ["finetune", "fedprox"]
    assert frame["forgetting"].tolist() == [one.summary["forgetting"], two.summary["forgetting"]]
    assert frame["folder"].tolist() == [str(one.folder), str(two.folder)]
    assert one.summary_frame()["model_sha256"].tolist() == [one.summary["model_sha256"]]
    with pytest.raises(UsageError):
        fedcl.frames([tmp_path / "nothing"])


def test_without_pandas_there_is_one_clear_line(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    result = tiny({"federation.rounds": 1})
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(UsageError, match=r"pandas is not installed.*fedcl-sim\[notebook\]"):
        result.frame()


def test_a_plot_is_a_figure(tiny: Tiny) -> None:
    from matplotlib.figure import Figure

    result = tiny({})
    assert isinstance(result.plot("matrix"), Figure)
    with pytest.raises(UsageError, match="Did you mean 'accuracy'"):
        result.plot("acuracy")


def test_a_result_shows_itself_as_a_small_table(tiny: Tiny) -> None:
    result = tiny({"name": "a <b>"})
    shown = result._repr_html_()
    assert "a &lt;b&gt;: finetune, seed 0, done" in shown
    assert f"{100 * result.summary['average_accuracy']:.1f} %" in shown


class Shown:
    """Stands for a notebook's front end, which is told what to show and what to show in its place."""

    def __init__(self) -> None:
        self.pages: list[str] = []
        self.displays = 0

    def display(self, page: Any, display_id: bool) -> Shown:
        assert display_id
        self.displays += 1
        self.pages.append(page)
        return self

    def update(self, page: Any) -> None:
        self.pages.append(page)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Shown:
    """A process that looks like the kernel of a notebook."""
    shown, ipython, display = Shown(), ModuleType("IPython"), ModuleType("IPython.display")
    shell = type("Shell", (), {"kernel": object()})()
    ipython.get_ipython = lambda: shell  # type: ignore[attr-defined]
    display.HTML = str  # type: ignore[attr-defined]
    display.display = shown.display  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    return shown


def test_outside_of_a_notebook_nobody_is_told() -> None:
    assert not in_notebook()
    assert isinstance(notebook_progress(), QuietProgress)


def test_ipython_in_a_terminal_is_no_notebook(kernel: Shown, monkeypatch: pytest.MonkeyPatch) -> None:
    assert in_notebook()
    monkeypatch.setattr(sys.modules["IPython"], "get_ipython", lambda: type("Terminal", (), {})())
    assert not in_notebook()


def test_progress_is_one_display_that_changes(kernel: Shown, tmp_path: Path) -> None:
    pages = kernel.pages
    fedcl.run(
        {"strategy": ["finetune"]}, seed=3, data={"limit": 12}, federation={"rounds": 2, "clients": 2},
        scenario={"tasks": 2}, engine={"threads": 1}, output={"dir": str(tmp_path), "plots": False},
    )  # fmt: skip
    assert kernel.displays == 1
    assert sum("<progress value='3' max='4'></progress> task 2/2 round 1/2" in page for page in pages) == 1
    assert "<progress" not in pages[-1]
    assert "task 2/2: accuracy" in pages[-1]


def test_a_long_run_does_not_fill_the_page_and_texts_are_escaped(kernel: Shown) -> None:
    progress = NotebookProgress()
    progress.start("a <b>", 100, 1, 0)
    assert kernel.pages[-1] == "a &lt;b&gt;"
    for task in range(100):
        progress.task_done(task, Standing())
    assert kernel.pages[-1].count("<br>") == NotebookProgress.kept - 1

"""Pictures: what is drawn, that nothing is clipped, and that a run folder is enough."""

import json
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from matplotlib import image
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from fedcl import plots
from fedcl.errors import UsageError
from fedcl.metrics import write_matrix
from fedcl.metrics.matrix import per_task_forgetting, seen_accuracy, seen_accuracy_weighted
from fedcl.plots import style

LONG = "W" * 90 + " " + "a_long_strategy_name+" * 12
R = np.array([[0.8, 0.1, 0.3], [0.6, 0.7, 0.2], [0.9, 0.4, 0.5]])


@pytest.fixture
def saved(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Figures as they were saved, so that their artists can be looked at."""
    figures: list[Figure] = []
    save = Figure.savefig

    def spy(figure: Figure, *args: object, **options: object) -> None:
        save(figure, *args, **options)
        figures.append(figure)

    monkeypatch.setattr(Figure, "savefig", spy)
    return figures


def stream(tasks: int, seed: int = 0) -> np.ndarray:
    return np.tril(np.random.Generator(np.random.Philox(seed)).random((tasks, tasks)))


def outside(figure: Figure) -> list[str]:
    """Texts of the figure that reach over its edge."""
    canvas = FigureCanvasAgg(figure)
    figure.draw_without_rendering()
    renderer = canvas.get_renderer()
    texts = [figure._suptitle, *(text for legend in figure.legends for text in legend.get_texts())]
    for axes in figure.axes:
        texts += [
            axes.xaxis.label,
            axes.yaxis.label,
            axes.title,
            *axes.get_xticklabels(),
            *axes.get_yticklabels(),
        ]
    width, height = figure.bbox.width, figure.bbox.height
    found = []
    for text in texts:
        box = text.get_window_extent(renderer)
        if text.get_text() and (box.x0 < -1 or box.y0 < -1 or box.x1 > width + 1 or box.y1 > height + 1):
            found.append(text.get_text())
    return found


def draw_all(matrix: np.ndarray, folder: Path, title: str) -> list[Path]:
    return [
        plots.plot_accuracy_curve({title: matrix, "_b": matrix}, folder / "a.png", title),
        plots.plot_matrix(matrix, folder / "m.png", title),
        plots.plot_forgetting(matrix, folder / "f.png", title),
        plots.plot_comparison({title: matrix, "b": [matrix, matrix]}, folder / "c.png", title),
    ]


@pytest.mark.parametrize("tasks", [1, 50])
def test_nothing_is_clipped(tasks: int, tmp_path: Path, saved: list[Figure]) -> None:
    paths = draw_all(stream(tasks), tmp_path, LONG)
    for path, figure in zip(paths, saved, strict=True):
        assert outside(figure) == [], path.name
        assert "".join(figure.get_suptitle().split()) == "".join(LONG.split())
        assert image.imread(path).shape[1] == int(figure.get_figwidth() * style.DPI)
        for axes in figure.axes:
            ticks = [t.get_window_extent() for t in axes.get_xticklabels() if t.get_text()]
            assert all(a.x1 < b.x0 for a, b in pairwise(ticks)), path.name
    assert sorted(tmp_path.iterdir()) == sorted(paths)


def test_undefined_matrices_are_drawn(tmp_path: Path, saved: list[Figure]) -> None:
    draw_all(np.full((3, 3), np.nan), tmp_path, "all undefined")
    curve, heat, bars, _ = saved
    assert "undefined after 1–3 tasks" in curve.legends[0].get_texts()[0].get_text()
    assert len(heat.axes[0].patches) == 9
    assert {patch.get_hatch() for patch in heat.axes[0].patches} == {"////"}
    assert "undefined" in heat.axes[0].get_xlabel()
    assert [text.get_text() for text in bars.axes[0].texts] == ["n/a", "n/a"]


def test_curve_draws_the_metric_in_percent(tmp_path: Path, saved: list[Figure]) -> None:
    plots.plot_accuracy_curve({"run": R}, tmp_path / "a.png", "t")
    plots.plot_accuracy_curve({"run": R}, tmp_path / "b.png", "t", [1, 2, 5])
    plain, weighted = (figure.axes[0].lines[0] for figure in saved)
    assert plain.get_xdata().tolist() == [1, 2, 3]
    assert plain.get_ydata() == pytest.approx(100 * np.array(seen_accuracy(R)))
    assert weighted.get_ydata() == pytest.approx(100 * np.array(seen_accuracy_weighted(R, [1, 2, 5])))
    assert "%" in saved[0].axes[0].get_ylabel()


def test_several_seeds_give_mean_and_band(tmp_path: Path, saved: list[Figure]) -> None:
    plots.plot_accuracy_curve({"run": [R, R**2]}, tmp_path / "a.png", "t")
    axes = saved[0].axes[0]
    both = 100 * np.array([seen_accuracy(R), seen_accuracy(R**2)])
    assert axes.lines[0].get_ydata() == pytest.approx(both.mean(axis=0))
    edge = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert edge.max() == pytest.approx((both.mean(axis=0) + both.std(axis=0, ddof=1)).max())
    assert "mean ± 1 s.d. of 2 seeds" in saved[0].legends[0].get_texts()[0].get_text()


def test_heat_map_cells_are_the_matrix_and_can_be_read(tmp_path: Path, saved: list[Figure]) -> None:
    plots.plot_matrix(R, tmp_path / "m.png", "t")
    axes = saved[0].axes[0]
    assert axes.images[0].get_array().data == pytest.approx(100 * R)
    colours = axes.images[0].get_cmap()
    for text in axes.texts:
        j, i = text.get_position()
        assert text.get_text() == f"{100 * R[int(i), int(j)]:.0f}"
        cell = style.luminance(colours(R[int(i), int(j)]))
        ink = style.luminance([float(text.get_color() == "white")] * 3)
        assert (max(cell, ink) + 0.05) / (min(cell, ink) + 0.05) > 4.5
    assert "After training" in axes.get_ylabel()
    assert "Tested" in axes.get_xlabel()


def test_forgetting_bars_show_sign(tmp_path: Path, saved: list[Figure]) -> None:
    plots.plot_forgetting(R, tmp_path / "f.png", "t")
    axes = saved[0].axes[0]
    heights = {round(bar.get_x() + bar.get_width() / 2): bar.get_height() for bar in axes.patches}
    assert [heights[1], heights[2]] == pytest.approx([100 * value for value in per_task_forgetting(R)])
    assert heights[1] < 0 < heights[2]
    assert [text.get_text() for text in axes.texts] == ["-10", "+30"]
    assert len({to_hex(bar.get_facecolor()) for bar in axes.patches}) == 2


def test_comparison_draws_the_last_row(tmp_path: Path, saved: list[Figure]) -> None:
    plots.plot_comparison({"a": R, "b": R.T}, tmp_path / "c.png", "t")
    bars = saved[0].axes[1].patches
    assert [bar.get_height() for bar in bars] == pytest.approx([90, 40, 50, 30, 20, 50])


def test_same_data_same_bytes(tmp_path: Path) -> None:
    first = plots.plot_forgetting(R, tmp_path / "a.png", "t").read_bytes()
    assert plots.plot_forgetting(R, tmp_path / "b.png", "t").read_bytes() == first


@pytest.mark.parametrize("draw", [plots.plot_accuracy_curve, plots.plot_comparison])
def test_wrong_runs(draw: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no run"):
        draw({}, tmp_path / "a.png", "t")
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        draw({"percent": 100 * R}, tmp_path / "a.png", "t")
    assert list(tmp_path.iterdir()) == []


def write_run(folder: Path) -> dict[str, object]:
    summary = {"name": "demo", "seed": 7, "strategy": ["fedlwf", "supcon"], "scenario": "class_incremental"}
    (folder / "summary.json").write_text(json.dumps(summary))
    write_matrix(folder / "accuracy_matrix.csv", R)
    return summary


def test_run_folder(tmp_path: Path, saved: list[Figure]) -> None:
    summary = write_run(tmp_path)
    paths = plots.write_run_plots(tmp_path)
    assert paths == [tmp_path / "plots" / f"{name}.png" for name in ("accuracy", "matrix", "forgetting")]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    titles = {" ".join(figure.get_suptitle().split()) for figure in saved}
    assert titles == {"demo: class_incremental, fedlwf + supcon, seed 7"}
    (tmp_path / "summary.json").write_text(json.dumps(summary | {"dataset": "mnist", "test_counts": [1, 2, 5]}))
    plots.write_run_plots(tmp_path)
    assert "mnist" in saved[3].get_suptitle()
    assert saved[3].axes[0].lines[0].get_ydata() == pytest.approx(100 * np.array(seen_accuracy_weighted(R, [1, 2, 5])))


@pytest.mark.parametrize("text", [None, "{", "[]", '{"name": "x"}'])
def test_broken_run_folder(tmp_path: Path, text: str | None) -> None:
    write_run(tmp_path)
    (tmp_path / "summary.json").unlink()
    if text is not None:
        (tmp_path / "summary.json").write_text(text)
    with pytest.raises(UsageError, match=r"summary\.json"):
        plots.write_run_plots(tmp_path)
    assert not (tmp_path / "plots").exists()


def test_matplotlib_is_loaded_only_to_draw() -> None:
    code = "import sys, fedcl.plots; assert 'matplotlib' not in sys.modules; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)

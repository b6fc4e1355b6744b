"""Settings that would be dropped in silence, and plugins that fail where nobody looks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from fedcl.config import load_config
from fedcl.errors import RunFailed, UsageError
from fedcl.settings.resolve import resolve

if TYPE_CHECKING:
    from fedcl.config import Config
    from fedcl.run import RunResult

BENCHMARK = """
import torch
from avalanche.benchmarks import nc_benchmark
from torch.utils.data import TensorDataset


def make(tasks):
    labels = torch.arange(60) % 6
    noise = torch.rand(60, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    images = noise * 0.3 + labels[:, None, None, None] / 10
    data = TensorDataset(images.clamp(0, 1), labels)
    data.targets = labels.tolist()
    return nc_benchmark(data, data, n_experiences=tasks, task_labels=False, seed=1)
"""


@pytest.fixture
def benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Settings of a stream that a module of the user's makes."""
    (tmp_path / "edge_benchmark.py").write_text(BENCHMARK)
    monkeypatch.syspath_prepend(str(tmp_path))
    return {
        "scenario.name": "benchmark",
        "scenario.benchmark": "edge_benchmark:make",
        "scenario.arguments": {"tasks": 3},
        "data.limit": None,
    }


def test_the_summary_names_the_images_that_were_used(
    benchmark: dict[str, Any], tiny: Callable[[Mapping[str, Any]], RunResult]
) -> None:
    summary = tiny(benchmark).summary
    assert (summary["dataset"], summary["num_tasks"]) == ("edge_benchmark:make", 3)
    assert tiny({}).summary["dataset"] == "digits"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data.limit", 5),
        ("data.size", 12),
        ("scenario.base", 2),
        ("scenario.increment", 2),
        ("scenario.order", "natural"),
    ],
)
def test_a_benchmark_refuses_what_it_does_not_read(
    key: str, value: Any, benchmark: dict[str, Any], tiny_config: Callable[[Mapping[str, Any]], Config]
) -> None:
    from fedcl.build import build

    with pytest.raises(UsageError, match=f"^{key}=.*is not read with scenario.name=benchmark"):
        build(tiny_config({**benchmark, key: value}))


def test_a_stream_of_the_data_section_refuses_a_benchmark(
    benchmark: dict[str, Any], tiny_config: Callable[[Mapping[str, Any]], Config]
) -> None:
    from fedcl.build import build

    with pytest.raises(UsageError, match=r"^scenario\.benchmark=.*scenario\.name=benchmark"):
        build(tiny_config({**benchmark, "scenario.name": "class_incremental"}))


def test_another_network_has_its_own_size() -> None:
    assert load_config(None, []).model.width == 128
    assert load_config(None, ["model.name=mlp"]).model.width == 128
    model = load_config({"model": {"name": "mlp", "width": 9, "depth": 2}}, ["model.name=resnet18"]).model
    assert (model.width, model.depth) == (None, None)
    assert load_config(None, ["model.name=resnet18", "model.width=8"]).model.width == 8


def test_a_strategy_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    file = tmp_path / "unmakeable.py"
    file.write_text(
        "from fedcl import Strategy\n\n\nclass Unmakeable(Strategy):\n    name = 'unmakeable'\n\n"
        "    def __init__(self, options):\n        raise ValueError('no way')\n"
    )
    config = load_config({}, {"strategy": ["unmakeable"], "plugins": [str(file)]})
    with pytest.raises(RunFailed, match="'unmakeable' failed in __init__: ValueError: no way"):
        resolve(config)


def test_a_run_can_be_repeated_from_another_folder(
    tiny: Callable[[Mapping[str, Any]], RunResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import numpy as np

    import fedcl

    (tmp_path / "here" / "images").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    labels = np.arange(24) % 4
    pixels = (np.arange(24 * 16) % 251).astype(np.uint8).reshape(24, 4, 4)
    np.savez("images/own.npz", train_x=pixels, train_y=labels, test_x=pixels, test_y=labels)
    base = tiny({"data.name": "images/own.npz", "output.dir": "base"})
    init = f"{base.folder}@task0"
    assert not Path(init).is_absolute()
    first = tiny({"data.name": "own", "data.root": "images", "init": init, "output.dir": "first"})
    folders = [base.folder.absolute(), first.folder.absolute()]
    monkeypatch.chdir(tmp_path)
    for folder, run in zip(folders, (base, first), strict=True):
        again = fedcl.run(folder / "config.yaml", overrides={"output.dir": f"again-{folder.parts[-3]}"})
        assert again.summary["model_sha256"] == run.summary["model_sha256"]

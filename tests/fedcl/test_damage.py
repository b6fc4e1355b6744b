"""Run folders that were damaged after the run, and plugins with a misspelt hook."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import pytest

from fedcl.errors import RunFailed
from fedcl.tell.progress import QuietProgress

if TYPE_CHECKING:
    from fedcl.run import RunResult

Tiny = Callable[[Mapping[str, Any]], "RunResult"]


def without_times(summary: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in summary.items() if k not in ("wall_seconds", "measured")}


@pytest.mark.parametrize("damage", ["torn summary", "no summary", "no matrix"])
def test_resume_repairs_a_finished_run(tiny: Tiny, damage: str) -> None:
    from fedcl.run import load, resume

    result = tiny({"strategy": ["fedlwf"]})
    if damage == "torn summary":
        (result.folder / "summary.json").write_text("{")
        with pytest.raises(RunFailed, match=r"summary.json is damaged"):
            load(result.folder)
    else:
        (result.folder / ("summary.json" if damage == "no summary" else "accuracy_matrix.csv")).unlink()
    again = resume(result.folder, progress=QuietProgress())
    assert without_times(again.summary) == without_times(result.summary)
    assert load(result.folder).matrix == result.matrix


def test_a_misspelt_hook_is_noted(tiny_config: Callable[..., Any], plugin: Any) -> None:
    from fedcl.build import build

    settings = plugin("def losss(self, step):\n    return {}")
    (note,) = [w for w in build(tiny_config(settings)).warnings if "no hook" in w]
    assert "'losss'" in note
    assert "'loss'" in note
    helper = plugin("def count(self, ctx):\n    return {}, ctx.state")
    assert not [w for w in build(tiny_config(helper)).warnings if "no hook" in w]

"""A sweep as tasks of a local Ray: the same bits as in worker processes, and a worker that is killed."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from fedcl.config import load_config, to_yaml
from fedcl.run import execute
from fedcl.sweep.command import sweep
from fedcl.sweep.prepare import Asked
from fedcl.tell.progress import QuietProgress

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.skipif("ray" in os.environ.get("FEDCL_SKIP", "").split(","), reason="FEDCL_SKIP names ray"),
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed: fedcl-sim[ray]"),
]

PLUGIN = '''
import os
import signal

from fedcl.strategy import Strategy


class Dying(Strategy):
    """Kills its process in its first round."""

    name = "dying"

    def after_aggregate(self, server):
        os.kill(os.getpid(), signal.SIGKILL)
'''


def test_a_sweep_on_ray(tmp_path: Path, tiny_config: Callable[[Mapping[str, Any]], Any]) -> None:
    plugin, file = tmp_path / "dying.py", tmp_path / "tiny.yaml"
    plugin.write_text(PLUGIN)
    own = {"plugins": [str(plugin)], "output.dir": str(tmp_path / "runs"), "name": "tiny"}
    file.write_text(to_yaml(tiny_config(own)))
    asked = Asked(str(file), ("strategy=dying,finetune",), seeds="5", workers=1, scheduler="ray", quiet=True)
    swept = sweep(asked)
    assert [outcome.status for outcome in swept.outcomes] == ["failed", "done"]
    assert swept.outcomes[0].cause == "its worker of Ray ended or was killed"
    folder = swept.points[1].folder
    alone = execute(load_config(folder / "config.yaml"), progress=QuietProgress(), folder=tmp_path / "alone")
    assert alone.summary["model_sha256"] == swept.as_objects()[1]["model_sha256"]

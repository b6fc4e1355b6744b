"""How many nodes there are and what they reserve, and what a runtime refuses before it starts."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import pytest

from fedcl.errors import RunFailed, UsageError
from fedcl.run import execute
from fedcl.runtimes import resources
from fedcl.runtimes.resources import check_runtime, settle_resources
from fedcl.tell.progress import QuietProgress

if TYPE_CHECKING:
    from fedcl.config import Config

TinyConfig = Callable[[Mapping[str, Any]], "Config"]


@pytest.mark.parametrize(
    ("cpus", "given", "expected"),
    [
        (8, {}, (3, 1.0)),  # no more nodes than clients
        (2, {}, (2, 1.0)),
        (8, {"engine.nodes": 2, "engine.threads": 3}, (2, 3.0)),
        (8, {"engine.threads": 4}, (2, 4.0)),
        (2, {"engine.nodes": 3}, (3, 0.6666)),
        (2, {"engine.nodes": 3, "engine.client_cpus": 0.5}, (3, 0.5)),
        (2, {"engine.nodes": 8, "engine.address": "auto"}, (8, 1.0)),
    ],
)
def test_what_ray_gets(
    tiny_config: TinyConfig,
    monkeypatch: pytest.MonkeyPatch,
    cpus: int,
    given: dict[str, Any],
    expected: tuple[int, float],
) -> None:
    monkeypatch.setattr(resources, "usable_cpus", lambda: cpus)
    engine = settle_resources(tiny_config({"engine.runtime": "ray", **given})).engine
    assert (engine.nodes, engine.client_cpus, engine.client_gpus) == (*expected, 0.0)
    assert engine.address is not None or engine.nodes * engine.client_cpus <= cpus


def test_gpus_are_shared(tiny_config: TinyConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(resources, "usable_cpus", lambda: 8)

    def settled(**engine: Any) -> tuple[int, float]:
        given = {f"engine.{key}": value for key, value in engine.items()}
        done = settle_resources(tiny_config({"engine.runtime": "ray", "engine.device": "cuda", **given})).engine
        return done.nodes, done.client_gpus

    assert settled() == (2, 1.0)
    assert settled(nodes=3) == (3, 0.6666)
    assert settled(nodes=1) == (1, 1.0)
    assert settled(nodes=4, client_gpus=0.25) == (4, 0.25)
    with pytest.raises(UsageError, match=r"engine.client_gpus=1.0: 3 nodes need 3 GPUs; 2 are used"):
        settled(nodes=3, client_gpus=1)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"engine.runtime": "ray", "engine.nodes": 4, "engine.client_cpus": 1000}, "4 nodes need 4000 processors"),
        ({"engine.runtime": "ray", "engine.nodes": 10**6}, "engine.nodes=1000000: must be at most"),
        ({"engine.runtime": "ray", "engine.nodes": 1, "engine.client_gpus": 1}, "1 nodes need 1 GPUs; 0 are used"),
    ],
)
def test_more_than_there_is(tiny_config: TinyConfig, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        settle_resources(tiny_config(settings))


def test_a_cluster_needs_the_number_of_actors(tiny_config: TinyConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "find_spec", lambda name: object())
    with pytest.raises(UsageError, match=r"engine.nodes=0"):
        check_runtime(tiny_config({"engine.runtime": "ray", "engine.address": "auto"}))


def test_without_ray_the_extra_is_named() -> None:
    code = (
        "import sys, importlib.util as u; found = u.find_spec\n"
        "u.find_spec = lambda name, package=None: None if name == 'ray' else found(name, package)\n"
        "from fedcl.commands.cli import run_command_line; sys.exit(run_command_line(['run', '--runtime', 'ray']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    said = "fedcl: engine.runtime='ray': Ray is not installed; it comes with the extra: pip install 'fedcl-sim[ray]'.\n"
    assert done.stderr == said


def test_without_a_superlink_there_is_one_line_and_the_folder_is_free_again(tiny_config: TinyConfig) -> None:
    import socket

    with socket.socket() as held:  # bound, and nobody listens
        held.bind(("127.0.0.1", 0))
        config = tiny_config({"engine.runtime": "deploy", "engine.address": f"127.0.0.1:{held.getsockname()[1]}"})
        for _ in range(2):
            with pytest.raises(RunFailed, match=r"no run was started.*SuperLink") as failed:
                execute(config, progress=QuietProgress())
            assert "\n" not in str(failed.value)

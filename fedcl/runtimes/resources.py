"""How many nodes a run has and what each may use, decided before it starts and written down."""

from __future__ import annotations

import math
from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING

from ..errors import UsageError
from ..records.environment import usable_cpus

if TYPE_CHECKING:
    from ..build import Experiment
    from ..config import Config


CROWD = 8
"""Actors for each processor of this machine, at most: more would only wait for one another."""


def check_runtime(config: Config) -> None:
    """Refuses what a runtime cannot do, before anything starts.

    Raises:
        UsageError: Ray is not installed, or settings and runtime do not fit.
    """
    engine = config.engine
    if engine.runtime == "ray" and find_spec("ray") is None:
        allowed = "Ray is not installed; it comes with the extra: pip install 'fedcl-sim[ray]'"
        raise UsageError("engine.runtime", "ray", allowed)
    if engine.runtime == "ray" and engine.address is not None and not engine.nodes:
        raise UsageError("engine.nodes", 0, "must be given with engine.address: how many actors the cluster runs")
    if engine.runtime == "deploy" and config.plugins:
        allowed = "a plugin file cannot be sent to SuperNodes with engine.runtime=deploy; install it there as a package"
        raise UsageError("plugins", config.plugins, f"{allowed} with an entry point fedcl.strategies")


def check_private(experiment: Experiment) -> None:
    """Refuses to test clients' own parts of the model at a server that does not have them.

    Raises:
        UsageError: ``deploy`` with such parts, and clients that have test sets of their own.
    """
    config = experiment.config
    tested = config.evaluate.personal and experiment.split.test is not None
    if config.engine.runtime == "deploy" and tested and experiment.node.private:
        allowed = "must be false with engine.runtime=deploy where parts of the model stay at the clients"
        raise UsageError("evaluate.personal", True, allowed)


def settle_resources(config: Config) -> Config:
    """The settings with the nodes of ``ray`` and what they reserve chosen where the user did not.

    Without a GPU as many nodes as processors allow at ``engine.threads`` (else 1) each; with GPUs one node a GPU.

    Raises:
        UsageError: more is asked for than this machine has.
    """
    engine = config.engine
    if engine.runtime != "ray":
        return config
    from ..local.engine import device_of

    cpus, gpus = usable_cpus(), 0
    if device_of(engine.device).type == "cuda":
        import torch

        gpus = torch.cuda.device_count()
    most = gpus or cpus // (engine.threads or 1)
    nodes = engine.nodes or max(1, min(most, config.federation.clients))
    here = engine.address is None
    if here and nodes > CROWD * cpus:
        allowed = f"must be at most {CROWD * cpus} here: each is a process, and {cpus} processors are usable"
        raise UsageError("engine.nodes", nodes, allowed)
    client_cpus = engine.client_cpus or (_share(cpus, nodes, engine.threads or cpus) if here else engine.threads or 1.0)
    client_gpus = engine.client_gpus or (_share(gpus, nodes, 1) if gpus else 0.0)
    if here and nodes * client_cpus > cpus:
        allowed = f"{nodes} nodes need {nodes * client_cpus:g} processors; {cpus} are usable here"
        raise UsageError("engine.client_cpus", client_cpus, allowed)
    if here and nodes * client_gpus > gpus:
        allowed = f"{nodes} nodes need {nodes * client_gpus:g} GPUs; {gpus} are used with engine.device={engine.device}"
        raise UsageError("engine.client_gpus", client_gpus, allowed)
    engine = replace(engine, nodes=nodes, client_cpus=float(client_cpus), client_gpus=client_gpus)
    return replace(config, engine=engine)


def _share(total: int, nodes: int, most: int) -> float:
    """An equal share: whole devices, or a fraction in Ray's steps of a ten-thousandth, rounded down so that all fit."""
    share = total / nodes
    if share >= 1:
        return float(min(math.floor(share), most))
    return max(1e-4, math.floor(share * 10_000) / 10_000)

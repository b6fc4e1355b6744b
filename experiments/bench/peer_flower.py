"""Flower's own simulation engine on Ray with Flower's own FedAvg.

Usage: python -m fedcl.experiments.bench.peer_flower WORKLOAD ROUNDS [KEY=VALUE]...

Here a ClientApp draws its images for every message, as one does that is written in a script: Ray copies the script's
functions with each message, so that nothing they keep lasts. :mod:`.peer_flower_kept` keeps them in each worker.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

from fedcl.bench.turns import Turns
from fedcl.experiments.bench.work import Work, kept_work_of, work_of
from fedcl.records.environment import usable_cpus

Load = Callable[[], Work]
"""Gives a worker its images; called for every message."""


def redrawing(workload: str, overrides: tuple[str, ...]) -> Load:
    """Draws all images anew at each call: other numbers than the workload's, of the same shapes."""
    work = work_of(workload, overrides)
    clients, shape, classes = work.clients, tuple(work.images[0].shape), int(max(y.max() for y in work.labels)) + 1
    made = replace(work, images=[], labels=[])

    def load() -> Work:
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(clients, *shape, generator=generator).to(made.device)
        labels = torch.randint(0, classes, (clients, shape[0]), generator=generator).to(made.device)
        return replace(made, images=list(images), labels=list(labels))

    return load


def keeping(workload: str, overrides: tuple[str, ...]) -> Load:
    """Reads the images once in each worker."""
    return partial(kept_work_of, workload, overrides)


def client_app(load: Load) -> ClientApp:
    """Local training of the client that a message is for."""
    app = ClientApp()

    @app.train()  # type: ignore[untyped-decorator]  # flwr is not followed by the type checker
    def train(message: Message, context: Context) -> Message:
        torch.set_num_threads(1)
        work = load()
        client = int(context.node_config["partition-id"])
        model = work.make()
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        optimiser = torch.optim.SGD(model.parameters(), lr=work.lr)
        images, labels = work.images[client], work.labels[client]
        for x, y in zip(torch.split(images, work.batch), torch.split(labels, work.batch), strict=True):
            optimiser.zero_grad()
            F.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]  # torch's own
            optimiser.step()
        reply = {"arrays": ArrayRecord(model.state_dict()), "metrics": MetricRecord({"num-examples": len(labels)})}
        return Message(RecordDict(reply), reply_to=message)

    return app


def server_app(work: Work, turns: Turns, rounds: int) -> ServerApp:
    """FedAvg over all clients, held up between its rounds."""
    app = ServerApp()

    def between(done: int, arrays: ArrayRecord) -> None:
        if done == 0:
            turns.ready(work.facts)
        else:
            turns.done()
        if done < rounds:
            turns.wait()

    @app.main()  # type: ignore[untyped-decorator]  # flwr is not followed by the type checker
    def main(grid: Grid, context: Context) -> None:
        strategy = FedAvg(fraction_train=1.0, fraction_evaluate=0.0)
        first = ArrayRecord(work.make().state_dict())
        strategy.start(grid, first, num_rounds=rounds, evaluate_fn=between)

    return app


def main(workload: str, rounds: int, overrides: tuple[str, ...], loading: Callable[..., Load]) -> None:
    """Takes its turns; ``loading`` is :func:`redrawing` or :func:`keeping`."""
    turns = Turns()
    work = work_of(workload, overrides)
    # One actor a processor; a GPU is shared by all of them.
    cpus = usable_cpus()
    gpus = 1 / cpus if work.device.type == "cuda" else 0.0
    backend: dict[str, Any] = {"client_resources": {"num_cpus": 1, "num_gpus": gpus}}
    clients = client_app(loading(workload, overrides))
    run_simulation(server_app(work, turns, rounds), clients, num_supernodes=work.clients, backend_config=backend)
    turns.finish({})


if __name__ == "__main__":
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    main(sys.argv[1], int(sys.argv[2]), tuple(sys.argv[3:]), redrawing)

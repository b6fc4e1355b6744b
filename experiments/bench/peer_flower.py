"""Flower's own simulation engine on Ray with Flower's own FedAvg.

Usage: python -m fedcl.experiments.bench.peer_flower WORKLOAD ROUNDS [KEY=VALUE]...
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
import torch.nn.functional as F
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

from fedcl.bench.turns import Turns
from fedcl.environment import usable_cpus
from fedcl.experiments.bench.work import Work, kept_work_of, work_of


def client_app(workload: str, overrides: tuple[str, ...]) -> ClientApp:
    """Local training of the client that a message is for."""
    app = ClientApp()

    @app.train()  # type: ignore[untyped-decorator]  # flwr is not followed by the type checker
    def train(message: Message, context: Context) -> Message:
        torch.set_num_threads(1)
        work = kept_work_of(workload, overrides)
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


def main(workload: str, rounds: int, overrides: tuple[str, ...]) -> None:
    """Takes its turns."""
    turns = Turns()
    work = work_of(workload, overrides)
    # One actor a processor; a GPU is shared by all of them.
    cpus = usable_cpus()
    gpus = 1 / cpus if work.device.type == "cuda" else 0.0
    backend: dict[str, Any] = {"client_resources": {"num_cpus": 1, "num_gpus": gpus}}
    clients = client_app(workload, overrides)
    run_simulation(server_app(work, turns, rounds), clients, num_supernodes=work.clients, backend_config=backend)
    turns.finish({})


if __name__ == "__main__":
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    main(sys.argv[1], int(sys.argv[2]), tuple(sys.argv[3:]))

"""No library for federations at all: the bare PyTorch loop.

Usage: python -m fedcl.experiments.bench.peer_loop WORKLOAD ROUNDS [KEY=VALUE]...
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedcl.bench.turns import Turns

from .work import threads_of, work_of


def federated_round(
    server: nn.Module,
    local: nn.Module,
    optimiser: torch.optim.Optimizer,
    images: Sequence[Tensor],
    labels: Sequence[Tensor],
    batch: int,
) -> None:
    """One round: every client trains ``local`` from the server's parameters, the server takes their plain mean.

    Args:
        server: the global model, changed in place.
        local: where clients train; its parameters are those of ``optimiser``.
        images, labels: of each client, (N, C, H, W) and (N,), taken in order, ``batch`` at a time.
    """
    shared: list[Tensor] = list(server.parameters())
    own: list[Tensor] = list(local.parameters())
    mean = [torch.zeros_like(p) for p in shared]
    for x, y in zip(images, labels, strict=True):
        with torch.no_grad():
            torch._foreach_copy_(own, shared)
        for part, targets in zip(torch.split(x, batch), torch.split(y, batch), strict=True):
            optimiser.zero_grad(set_to_none=True)
            F.cross_entropy(local(part), targets).backward()  # type: ignore[no-untyped-call]  # torch's own
            optimiser.step()
        with torch.no_grad():
            torch._foreach_add_(mean, own, alpha=1 / len(images))
    with torch.no_grad():
        torch._foreach_copy_(shared, mean)


def main(workload: str, rounds: int, overrides: list[str]) -> None:
    """Takes its turns."""
    turns = Turns()
    torch.set_num_threads(threads_of(workload))
    work = work_of(workload, overrides)
    server, local = work.make(), work.make()
    optimiser = torch.optim.SGD(local.parameters(), lr=work.lr)
    turns.ready(work.facts)
    for _ in range(rounds):
        turns.wait()
        federated_round(server, local, optimiser, work.images, work.labels, work.batch)
        turns.done()
    turns.finish({})


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3:])

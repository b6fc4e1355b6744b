"""PeFLL written out: a descriptor image by image, a hypernetwork unit by unit, and a round as one graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fedcl import random as counter
from fedcl.build import build
from fedcl.federation.call import below
from fedcl.federation.store import ClientStore
from fedcl.models.arrays import grow_head
from fedcl.strategies.hypernetwork._networks import drawn_hypernetwork

PHI = "extra.pefll.embedding."


@pytest.fixture
def kept() -> Any:
    """``kept(result)``: by client, the model that it was given last."""

    def read(result: Any) -> Any:
        store = ClientStore(result.folder / "clients", 0)
        return {client: below(store.get(client, 10**9), "pefll/own/") for client in store.clients()}

    return read


def made_by_hand(h: Any, v: Any) -> Any:
    """One model of one descriptor (l,), unit by unit; ``h`` as it stands in the server state."""
    units, layer = v, 0
    while f"hidden/{layer}.weight" in h:
        w, b = h[f"hidden/{layer}.weight"], h[f"hidden/{layer}.bias"]
        sums = [sum(w[i, j] * units[j] for j in range(len(units))) + b[i] for i in range(len(w))]
        units = torch.stack([s * float(s > 0) for s in sums])
        layer += 1
    names = [n.split("/", 1)[1] for n in h if n.startswith("base/")]
    return {n: h[f"base/{n}"] + sum(units[i] * h[f"slope/{n}"][i] for i in range(len(units))) for n in names}


def embedded_by_hand(phi: Any, x: Any, labels: list[int]) -> Any:
    """(l,): the mean over images (n, channels, h, w) of a network that sees each label as planes."""
    total = torch.zeros((), dtype=x.dtype)
    for image, label in zip(x, labels, strict=True):
        planes = [torch.full_like(image[:1], float(c == label)) for c in range(len(phi["label"]))]
        kernels = torch.cat([phi["image"], *[phi["label"][c][:, None] for c in range(len(planes))]], dim=1)
        z = F.conv2d(torch.cat([image, *planes])[None], kernels, phi["bias"], padding=2)
        z = F.max_pool2d(z * (z > 0), 2)
        z = F.conv2d(z, phi["second.weight"], phi["second.bias"], padding=2)
        z = F.max_pool2d(z * (z > 0), 2).flatten()
        for layer in (0, 2, 4):
            z = phi[f"rest.{layer}.weight"] @ z + phi[f"rest.{layer}.bias"]
            z = z * (z > 0) if layer < 4 else z
        total = total + z
    return total / len(labels)


def local_steps(oracle: Any, world: Any, client: int, round_: int, start: Any, steps: int) -> Any:
    """SGD with momentum from ``start``, over as many epochs as ``steps`` need."""
    settings, rows = world.config, world.held[0][client]
    key, size = (settings.seed, "client", client, 0, round_), settings.federation.batch_size
    w, velocity = dict(start), {n: torch.zeros_like(a) for n, a in start.items()}
    done = epoch = 0
    while done < steps:
        order = counter.permutation(len(rows), *key, "order", epoch).tolist()
        for at in range(0, len(rows), size):
            if done == steps:
                break
            batch = [rows[i] for i in order[at : at + size]]
            w = oracle.leaves(w)
            scores = oracle.logits(w, world.x[batch])
            loss = oracle.cross_entropy(scores, [world.y[i] for i in batch], world.known[0])
            grads = oracle.gradient(loss, w)
            with torch.no_grad():
                for n in w:
                    velocity[n] = settings.optimiser.momentum * velocity[n] + grads[n]
                    w[n] = w[n] - settings.optimiser.lr * velocity[n]
            done += 1
        epoch += 1
    return {n: a.detach() for n, a in w.items()}


class Literal:
    """A run of one task in which embedding, hypernetwork and inner product of a round are one graph."""

    def __init__(self, oracle: Any, config: Any) -> None:
        self.oracle, self.world = oracle, oracle.World.of(config)
        experiment = build(config)
        grown = grow_head(self.world.start, experiment.node.model, self.world.order, config.seed)
        self.options = experiment.node.stack.strategies[0].options
        self.start = {n: a for n, a in grown.items() if not n.startswith(PHI)}
        key, sizes = (config.seed, "server", 0, 0, "pefll"), self.options
        self.h = oracle.leaves(drawn_hypernetwork(self.start, sizes.descriptor, sizes.hidden, sizes.layers, *key))
        self.phi = oracle.leaves(
            {n.removeprefix(PHI): a.to(torch.float64) for n, a in grown.items() if n.startswith(PHI)}
        )
        self.mean: Any = None
        self.deviation: Any = None

    def descriptor(self, client: int, round_: int | None) -> Any:
        """Of the images drawn in a round; without one, of all."""
        config, rows = self.world.config, self.world.held[0][client]
        if round_ is not None:
            key = (config.seed, "client", client, 0, round_, "pefll", "descriptor")
            order = counter.permutation(len(rows), *key)[: config.federation.batch_size]
            rows = [rows[i] for i in order]
        return embedded_by_hand(self.phi, self.world.x[rows].view(-1, 1, 8, 8), [self.world.y[i] for i in rows])

    def scaled(self, v: Any) -> Any:
        if self.mean is None:
            entries = v.tolist()
            self.mean = sum(entries) / len(entries)
            self.deviation = (sum((e - self.mean) ** 2 for e in entries) / (len(entries) - 1)) ** 0.5
        return (v - self.mean) / self.deviation

    def run(self, cohorts: list[list[int]]) -> Any:
        """The global model after the last round."""
        options = self.options
        leaves = [*self.h.values(), *self.phi.values()]
        first, second = ([torch.zeros_like(a) for a in leaves] for _ in range(2))
        for round_, cohort in enumerate(cohorts):
            total, seen = torch.zeros(()), []
            for client in sorted(cohort):
                v = self.descriptor(client, round_)
                theta = made_by_hand(self.h, self.scaled(v))
                start = {n: a.detach() for n, a in theta.items()}
                trained = local_steps(self.oracle, self.world, client, round_, start, options.inner_steps)
                total = total + torch.stack([((start[n] - trained[n]) * theta[n]).sum() for n in theta]).sum()
                seen.append(v.detach())
            grads = torch.autograd.grad(total / len(cohort), leaves)
            with torch.no_grad():
                for a, g, m, s in zip(leaves, grads, first, second, strict=True):
                    if options.optimiser == "sgd":
                        a -= options.lr * (g + options.decay * a)
                        continue
                    m.copy_(0.9 * m + 0.1 * g)
                    s.copy_(0.999 * s + 0.001 * g * g)
                    bias, other = 1 - 0.9 ** (round_ + 1), 1 - 0.999 ** (round_ + 1)
                    a -= options.lr * (m / bias) / ((s / other).sqrt() + 1e-8)
        return self.model(torch.stack(seen).mean(0))

    def model(self, v: Tensor) -> Any:
        """What the hypernetwork makes of a descriptor."""
        return {n: a.detach() for n, a in made_by_hand(self.h, self.scaled(v.detach())).items()}


@pytest.fixture
def by_hand() -> Callable[[Any, Any], Any]:
    """``by_hand(h, v)``: the model of one descriptor, unit by unit."""
    return made_by_hand


@pytest.fixture
def literal(oracle: Any) -> Callable[[Any], Literal]:
    """``literal(config)``: the run of a configuration of one task, written out."""
    return lambda config: Literal(oracle, config)

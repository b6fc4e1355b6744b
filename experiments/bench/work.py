"""The work of one round, for peers: the same networks, images and steps as ours, without any of our engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from fedcl.bench.workloads import Override, settings
from fedcl.config import Model
from fedcl.data.sources import load_dataset
from fedcl.models.zoo import build_encoder

THREADS = 2  # where the workload does not say


@dataclass(frozen=True)
class Work:
    """What one workload is made of.

    Attributes:
        make: a new model on ``device``.
        images: of each client, (N, C, H, W) float32, normalised, on ``device``.
        labels: of each client, (N,) int64.
        batch: images a step; a round is one pass over a client's images in order.
        lr: of plain SGD.
    """

    make: Callable[[], nn.Module]
    images: list[Tensor]
    labels: list[Tensor]
    batch: int
    lr: float
    device: torch.device

    @property
    def clients(self) -> int:
        """All of them train in every round."""
        return len(self.images)

    @property
    def facts(self) -> dict[str, str | None]:
        """Device and GPU, for the report."""
        gpu = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else None
        return {"device": self.device.type, "gpu": gpu}


def network(config: Model, shape: tuple[int, int, int], classes: int) -> nn.Module:
    """The workload's network for images of ``shape`` (C, H, W) as plain PyTorch modules."""
    channels, height, width = shape
    if config.name == "mlp":
        hidden = config.width or 128
        inputs = channels * height * width
        return nn.Sequential(nn.Flatten(), nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, classes))
    if config.name == "lenet":
        convolutions = [nn.Conv2d(channels, 16, 5), nn.ReLU(), nn.MaxPool2d(2)]
        convolutions += [nn.Conv2d(16, 32, 5), nn.ReLU(), nn.MaxPool2d(2)]
        rows, columns = (((side - 4) // 2 - 4) // 2 for side in (height, width))
        dense = [nn.Flatten(), nn.Linear(32 * rows * columns, 64), nn.ReLU(), nn.Linear(64, classes)]
        return nn.Sequential(*convolutions, *dense)
    if config.name == "simple_cnn":
        return nn.Sequential(
            nn.Conv2d(channels, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.25),
            nn.Flatten(), nn.Linear(64 * ((height - 4) // 2) * ((width - 4) // 2), 128), nn.ReLU(), nn.Dropout(0.5),
            nn.Linear(128, classes),
        )  # fmt: skip
    # A residual network has no second spelling worth having: ours, used as the plain module that it is.
    encoder, features = build_encoder(config, shape)
    return nn.Sequential(encoder, nn.Linear(features, classes))


def device_of(name: str) -> torch.device:
    """What ``engine.device`` means."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else torch.device(name)


def work_of(workload: str, overrides: Sequence[Override]) -> Work:
    """The work of a workload, its images on the device."""
    config = settings(workload, overrides)
    device = device_of(config.engine.device)
    layout = torch.channels_last if config.engine.memory_format == "channels_last" else torch.contiguous_format
    dataset = load_dataset(config.data, str(device))
    store, clients = dataset.train, config.federation.clients
    rows = torch.arange(len(store), device=device).reshape(clients, -1)
    model, shape, classes = config.model, store.shape, dataset.num_classes
    return Work(
        make=lambda: network(model, shape, classes).to(device).to(memory_format=layout),
        images=[store.batch(mine).contiguous(memory_format=layout) for mine in rows],
        labels=[store.label_tensor[mine] for mine in rows],
        batch=config.federation.batch_size,
        lr=config.optimiser.lr,
        device=device,
    )


@cache
def kept_work_of(workload: str, overrides: tuple[str, ...]) -> Work:
    """:func:`work_of`, read once in a process; a function that Ray copies into its processes keeps nothing."""
    return work_of(workload, overrides)


def threads_of(workload: str) -> int:
    """How many threads a peer may use: what the workload says for everyone, else two."""
    return settings(workload).engine.threads or THREADS

"""Ranges and choices of the settings: all that can be checked before anything heavy is imported."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from ..models import catalog
from .passes import check_passes
from .times import check_time

if TYPE_CHECKING:
    from ..config import Config

CHOICES: dict[str, tuple[str, ...]] = {
    "scenario.order": ("random", "natural", "seed1993", "given"),
    "partition.tail": ("shuffled", "ordered"),
    "scenario.shift": ("given", "permuted", "rotated"),
    "scenario.tail": ("shuffled", "ordered"),
    "scenario.noise": ("symmetric", "asymmetric"),
    "labels.per": ("sample", "client"),
    "model.norm": catalog.NORMS,
    "model.projector": catalog.PROJECTORS,
    "model.head": catalog.HEADS,
    "model.head_allocate": catalog.ALLOCATIONS,
    "model.feature_norm": catalog.FEATURE_NORMS,
    "model.batch_norm": ("average", "local", "frozen"),
    "federation.weighting": ("samples", "uniform"),
    "time.order": ("common", "asynchronous", "client_specific"),
    "time.sequence": ("shuffled", "lagged"),
    "time.straggler_policy": ("wait", "partial", "drop"),
    "federation.passes": ("many", "once"),
    "optimiser.name": ("sgd", "adam", "adamw"),
    "optimiser.schedule": ("constant", "cosine", "linear", "step"),
    "optimiser.per": ("step", "round", "task"),
    "evaluate.on": ("test", "validation"),
    "engine.runtime": ("local", "ray", "deploy"),
    "engine.path": ("auto", "stacked", "sequential"),
    "engine.dtype": ("float32", "float64", "bf16"),
    "evaluate.predict": ("auto", "head", "knn", "linear", "nearest_mean"),
    "engine.memory_format": ("auto", "contiguous", "channels_last"),
}

# Keys whose value must be at least this; null passes where the schema allows it.
_AT_LEAST: dict[str, int] = {
    "seed": 0,
    "data.size": 1,
    "data.limit": 1,
    "scenario.tasks": 1,
    "scenario.base": 1,
    "scenario.increment": 1,
    "scenario.steps": 1,
    "scenario.shots": 1,
    "scenario.imbalance": 1,
    "partition.min_size": 0,
    "partition.size": 0,
    "partition.shards": 1,
    "partition.classes": 1,
    "partition.imbalance": 1,
    "partition.held_out": 0,
    "partition.public": 0,
    "labels.count": 1,
    "labels.batch_size": 0,
    "model.width": 1,
    "model.depth": 1,
    "model.projector_dim": 1,
    "federation.clients": 1,
    "federation.cohort": 0,
    "federation.rounds": 1,
    "federation.epochs": 1,
    "federation.steps": 1,
    "federation.repeats": 1,
    "federation.batch_size": 1,
    "federation.batch_min": 0,
    "time.classes": 1,
    "time.start": 0,
    "time.growth": 0,
    "time.slowdown": 1,
    "optimiser.weight_decay": 0,
    "optimiser.warmup": 0,
    "engine.threads": 0,
    "engine.nodes": 0,
    "engine.chunk": 0,
    "engine.client_cpus": 0,
    "engine.client_gpus": 0,
    "evaluate.every": 0,
    "evaluate.batch_size": 1,
    "evaluate.probe_samples": 0,
    "evaluate.features": 0,
    "evaluate.top": 1,
    "checkpoint.every": 0,
    "checkpoint.keep": 1,
}

_POSITIVE = (
    "partition.alpha",
    "partition.skew",
    "optimiser.lr",
    "optimiser.eps",
    "optimiser.clip",
    "optimiser.gamma",
    "engine.timeout",
)

_INTERVALS: dict[str, tuple[Callable[[float], bool], str]] = {
    "data.validation": (lambda x: 0 <= x < 1, "must be in [0, 1)"),
    "scenario.disjoint": (lambda x: 0 <= x <= 1, "must be in [0, 1]"),
    "scenario.blurred": (lambda x: 0 <= x <= 1, "must be in [0, 1]"),
    "scenario.overlap": (lambda x: 0 <= x <= 0.5, "must be in [0, 0.5]"),
    "scenario.noise_rate": (lambda x: 0 <= x <= 1, "must be in [0, 1]"),
    "scenario.mixed": (lambda x: 0 <= x < 1, "must be in [0, 1)"),
    "scenario.labelled": (lambda x: 0 <= x <= 1, "must be in [0, 1]"),
    "labels.rate": (lambda x: 0 <= x <= 1, "must be in [0, 1]"),
    "federation.participation": (lambda x: 0 < x <= 1, "must be in (0, 1]"),
    "time.shared": (lambda x: 0 <= x <= 1, "must be in [0, 1]"),
    "time.joining": (lambda x: 0 <= x <= 1, "must be in [0, 1]"),
    "time.leaving": (lambda x: 0 <= x <= 1, "must be in [0, 1]"),
    "time.participation": (lambda x: 0 < x <= 1, "must be in (0, 1]"),
    "time.stragglers": (lambda x: 0 <= x <= 1, "must be in [0, 1]"),
    "time.slowdown": (lambda x: x <= 1e6, "must be at most 1000000"),
    "optimiser.momentum": (lambda x: 0 <= x < 1, "must be in [0, 1)"),
    "optimiser.final": (lambda x: 0 <= x <= 1, "must be in [0, 1]"),
    "model.dropout": (lambda x: 0 <= x < 1, "must be in [0, 1)"),
}

PROBES: dict[str, str] = {
    "nearest_mean": "accuracy of the nearest class mean, unit features",
    "knn": "accuracy of 20 nearest neighbours by cosine",
    "linear": "accuracy of a linear layer trained on frozen features",
    "retrieval": "Recall@1, Recall@5 and mAP@R among test images",
    "compatibility": "new queries in old galleries: matrix row, AC, AM, BC, FC",
    "cka": "linear CKA of each old task's images with the model that learned them",
    "drift": "distance and cosine of old images' features since they were learned",
    "prototypes": "error of class means that were stored when the class was learned",
    "hypersphere": "alignment, uniformity, tolerance",
    "collapse": "neural collapse NC1 to NC4, CDNV",
    "spectrum": "effective rank, participation ratio, stable rank, share of the first directions",
    "dormant": "share of feature units that are silent or nearly so",
    "calibration": "expected calibration error of the head",
    "novelty": "AUROC and FPR at 95 % TPR of known against unknown classes",
    "clustering": "accuracy of k-means clusters: all, old and new classes",
}
"""What may stand in ``evaluate.probes``."""

EXCHANGES = ("auto", "all", "trained")
_NAMES = ("data.name", "scenario.name", "partition.name", "model.name", "output.dir")
_NO_TWICE = (
    "strategy", "data.domains", "scenario.classes", "scenario.of", "scenario.datasets", "evaluate.probes",
    "output.loggers", "output.callbacks",
)  # fmt: skip
LOGGERS = ("tensorboard", "wandb")
"""What may stand in ``output.loggers``."""

_LARGEST_SEED = 2**63 - 1


def validate(config: Config) -> None:
    """Checks every range, choice and combination that needs no data, no model and no strategy class.

    Raises:
        UsageError: naming the key, its value and what is allowed.
    """
    # Not at the top: these modules import the schema, which imports this one.
    from ..partitioning import parse_test_rule
    from ..records.runfolder import check_name

    flat = _flatten(asdict(config))
    for key, names in CHOICES.items():
        if flat[key] not in names:
            raise UsageError(key, flat[key], f"must be one of {', '.join(names)}", names)
    for key, least in _AT_LEAST.items():
        if flat[key] is not None and not flat[key] >= least:
            raise UsageError(key, flat[key], f"must be at least {least}")
    for key in _POSITIVE:
        if flat[key] is not None and not flat[key] > 0:
            raise UsageError(key, flat[key], "must be above 0")
    for key, (inside, text) in _INTERVALS.items():
        if not inside(flat[key]):
            raise UsageError(key, flat[key], text)
    for key in _NAMES:
        if not flat[key].strip():
            raise UsageError(key, flat[key], "must not be empty")
    for key in _NO_TWICE:
        if len(set(flat[key])) < len(flat[key]):
            raise UsageError(key, flat[key], "names an entry twice")
    for probe in config.evaluate.probes:
        if probe not in PROBES:
            raise UsageError("evaluate.probes", probe, f"must be among {', '.join(PROBES)}", PROBES)
    if config.evaluate.on == "validation" and not config.data.validation:
        raise UsageError("data.validation", 0.0, "must be above 0 with evaluate.on=validation")
    for logger in config.output.loggers:
        if logger not in LOGGERS:
            raise UsageError("output.loggers", logger, f"must be among {', '.join(LOGGERS)}", LOGGERS)
    check_name(config.name)
    parse_test_rule(config.partition.test)
    if config.seed > _LARGEST_SEED:
        raise UsageError("seed", config.seed, "must be below 2**63")
    if not config.strategy:
        raise UsageError("strategy", config.strategy, "must name at least one strategy")
    _check_scenario(config)
    _check_partition(config)
    _check_federation(config)
    check_time(config)
    _check_optimiser(config)
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", config.engine.device):
        allowed = "must be auto, cpu, cuda or cuda:N"
        raise UsageError("engine.device", config.engine.device, allowed, ("auto", "cpu", "cuda"))


def _check_scenario(config: Config) -> None:
    scenario = config.scenario
    if scenario.order == "given" and not scenario.classes:
        raise UsageError("scenario.classes", scenario.classes, "must list the class order with order=given")
    if scenario.classes and scenario.order != "given":
        raise UsageError("scenario.order", scenario.order, "must be given when scenario.classes is set")
    if any(label < 0 for label in scenario.classes):
        raise UsageError("scenario.classes", scenario.classes, "must be class numbers of at least 0")
    if scenario.arguments and scenario.benchmark is None:
        raise UsageError("scenario.arguments", scenario.arguments, "is only read with scenario.benchmark")


def _check_partition(config: Config) -> None:
    partition = config.partition
    if partition.held_out > 1 and partition.held_out != int(partition.held_out):
        allowed = "must be a whole number of clients or a share below 1"
        raise UsageError("partition.held_out", partition.held_out, allowed)
    if partition.public > 1 and partition.public != int(partition.public):
        allowed = "must be a whole number of images of each class or a share below 1"
        raise UsageError("partition.public", partition.public, allowed)
    if not config.labels.public and not config.partition.public:
        raise UsageError("labels.public", False, "is only read with partition.public")
    if config.labels.count is not None and (config.labels.rate != 1 or config.labels.per != "sample"):
        raise UsageError("labels.count", config.labels.count, "must be null with labels.rate or labels.per=client")
    if not partition.size:
        return
    if partition.test != "global":
        allowed = "must be global with partition.size: clients that draw their images have no test set of their own"
        raise UsageError("partition.test", partition.test, allowed, ("global",))
    if partition.balance:
        raise UsageError("partition.balance", True, "must be false with partition.size: all clients hold equally many")
    if partition.min_size > partition.size:
        raise UsageError("partition.min_size", partition.min_size, f"must not be above partition.size={partition.size}")


def _check_federation(config: Config) -> None:
    federation = config.federation
    if federation.cohort and federation.participation != 1:
        both = (federation.cohort, federation.participation)
        raise UsageError("federation.cohort, federation.participation", both, "at most one of them must be set")
    if federation.cohort > federation.clients:
        allowed = f"must not be above federation.clients={federation.clients}"
        raise UsageError("federation.cohort", federation.cohort, allowed)
    exchange = federation.exchange
    if exchange not in EXCHANGES if isinstance(exchange, str) else not 1 <= exchange <= federation.clients:
        allowed = f"must be one of {', '.join(EXCHANGES)}, or a number from 1 to federation.clients"
        raise UsageError("federation.exchange", exchange, allowed, EXCHANGES)
    if (federation.epochs is None) == (federation.steps is None):
        given = (federation.epochs, federation.steps)
        raise UsageError("federation.epochs, federation.steps", given, "exactly one of them must be set")
    check_passes(federation)
    if federation.batch_min > federation.batch_size:
        allowed = f"must not be above federation.batch_size={federation.batch_size}"
        raise UsageError("federation.batch_min", federation.batch_min, allowed)


def _check_optimiser(config: Config) -> None:
    optimiser = config.optimiser
    if len(optimiser.betas) != 2 or not all(0 <= beta < 1 for beta in optimiser.betas):
        raise UsageError("optimiser.betas", optimiser.betas, "must be two numbers in [0, 1)")
    if optimiser.nesterov and (optimiser.name != "sgd" or optimiser.momentum == 0):
        raise UsageError("optimiser.nesterov", True, "needs optimiser.name=sgd and a momentum above 0")
    stones = optimiser.milestones
    if any(a >= b for a, b in zip([-1, *stones], stones, strict=False)):
        raise UsageError("optimiser.milestones", stones, "must be whole numbers of at least 0 in rising order")
    if (optimiser.schedule == "step") != bool(stones):
        allowed = "must be given with schedule=step, and only then"
        raise UsageError("optimiser.milestones", stones, allowed)


def _flatten(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in data.items():
        flat[prefix + key] = value
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
    return flat

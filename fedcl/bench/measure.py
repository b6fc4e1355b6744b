"""Runs workloads with the contestants that are installed and sums up what was measured."""

from __future__ import annotations

import datetime
import importlib.metadata
import importlib.util
import platform
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..records.environment import cpu_model, source_revision, usable_cpus, versions
from . import workloads
from .players import Player, Say, play
from .workloads import COHORTS, PACKAGE, SCALED, SCALING, WIDTHS, Override

OURS = "fedcl"
NOT_ASKED = "not asked for"
Result = dict[str, Any]


@dataclass(frozen=True)
class Contestant:
    """Who takes part.

    Attributes:
        module: run with ``python -m``, with workload, number of rounds and overrides as arguments.
        needs: importable names without which it is not installed.
        install: how to get it.
    """

    module: str
    needs: tuple[str, ...] = ()
    install: str = ""

    @property
    def lacks(self) -> str | None:
        """The first needed package that is not installed."""
        return next((name for name in self.needs if importlib.util.find_spec(name) is None), None)


# pfl's own requirements would replace installed packages by older ones that it runs without.
_PFL = "--no-deps pfl==0.6.0 'multiprocess<0.71' dill prv-accountant 'dp-accounting<0.6' immutabledict dm-tree"
CONTESTANTS: dict[str, Contestant] = {
    OURS: Contestant(f"{PACKAGE}.ours"),
    "loop": Contestant(f"{PACKAGE}.peer_loop"),
    "pfl": Contestant(f"{PACKAGE}.peer_pfl", ("pfl",), f"pip install {_PFL}"),
    "flower-ray": Contestant(f"{PACKAGE}.peer_flower", ("ray",), "pip install 'ray>=2.55'"),
    "flower-ray-kept": Contestant(f"{PACKAGE}.peer_flower_kept", ("ray",), "pip install 'ray>=2.55'"),
}
FEW = {"resnet18": (OURS, "loop"), SCALING: (OURS, "loop", "pfl")}
"""Who takes part by default where it is not everyone."""


def take_part(peers: str | None, workload: str) -> tuple[str, ...]:
    """Names of the contestants that ``--peers`` means, in their fixed order; ours always.

    Raises:
        UsageError: an unknown name.
    """
    if peers is None:
        return FEW.get(workload, tuple(CONTESTANTS))
    asked = [name.strip() for name in peers.split(",") if name.strip()]
    for name in asked:
        if name not in CONTESTANTS:
            raise UsageError("--peers", name, f"must be among {', '.join(CONTESTANTS)}", CONTESTANTS)
    return tuple(name for name in CONTESTANTS if name in (OURS, *asked))


def bench(
    workload: str, rounds: int, names: Sequence[str], engine: Sequence[str], device: str | None, say: Say
) -> Result:
    """Measures one workload; ``scaling`` is many of them.

    Args:
        workload: one of :data:`fedcl.bench.workloads.NAMES`.
        rounds: measured rounds, after the first, which is reported apart.
        names: contestants.
        engine: ``engine.key=value`` overrides for ours.
        device: as ``engine.device``, for all; None: what there is.
        say: is told how it goes, in lines.

    Raises:
        UsageError: wrong settings; nothing has run.
    """
    if workload != SCALING:
        return measure(workload, (), rounds, names, engine, device, say)
    axes: dict[str, list[tuple[int, list[Override]]]] = {
        "cohort": [(clients, workloads.of_cohort(clients)) for clients in COHORTS],
        "width": [(width, [("model.width", width), *workloads.of_cohort(COHORTS[1])]) for width in WIDTHS],
    }
    found: Result = {"workload": SCALING, "device": None}
    for axis, points in axes.items():
        found[axis] = []
        for value, work in points:
            say(f"{axis} {value}")
            point = measure(SCALED, work, rounds, names, engine, device, say)
            found[axis].append({axis: value, **point})
    found |= {key: found["cohort"][0][key] for key in ("device", "rounds", "machine", "engine")}
    return found


def measure(
    workload: str,
    work: Sequence[Override],
    rounds: int,
    names: Sequence[str],
    engine: Sequence[str],
    device: str | None,
    say: Say,
    contestants: Mapping[str, Contestant] = CONTESTANTS,
) -> Result:
    """One workload, changed by the overrides ``work`` for every contestant; the rest is as in :func:`bench`."""
    common = [*work, *([("engine.device", device)] if device else [])]
    workloads.settings(workload, [*common, *engine])
    reasons = {name: NOT_ASKED for name in contestants if name not in names}
    for name in names:
        lacking = contestants[name].lacks
        if lacking:
            reasons[name] = f"not installed: there is no {lacking}; {contestants[name].install}"
            say(f"{name} is {reasons[name]}")
    with tempfile.TemporaryDirectory(prefix="fedcl-bench-") as place:
        folder = Path(place)
        commands = {}
        for name in names:
            own = [*engine, f"output.dir={folder / 'runs'}"] if name == OURS else []
            texts = [*(o if isinstance(o, str) else f"{o[0]}={o[1]}" for o in common), *own]
            start = [sys.executable, "-m", contestants[name].module, workload, str(rounds + 1)]
            if name not in reasons:
                commands[name] = [*start, *texts]
        say(f"{workload}: {', '.join(commands)}; a warm-up and {rounds} rounds each")
        players = {player.name: player for player in play(commands, rounds, folder, say)}
    for name, player in players.items():
        if player.failure is not None:
            reasons[name] = player.failure
    return summary(workload, work, rounds, contestants, players, reasons)


def summary(
    workload: str,
    work: Sequence[Override],
    rounds: int,
    contestants: Mapping[str, Contestant],
    players: Mapping[str, Player],
    reasons: Mapping[str, str],
) -> Result:
    """The result of a workload as JSON values: None, with a reason, for whoever is missing or failed."""
    good = {name: player for name, player in players.items() if player.failure is None}
    medians = {name: statistics.median(p.seconds[1:]) for name, p in good.items()}
    ours = medians.get(OURS)
    facts = [player.facts for player in good.values()]

    def of_each(values: Mapping[str, Any]) -> dict[str, Any]:
        return {name: values.get(name) for name in contestants}

    return {
        "workload": workload,
        "device": next((f["device"] for f in facts if "device" in f), None),
        "seconds_per_round": of_each(medians),
        "ratio": {n: medians[n] / ours if ours and n in medians else None for n in contestants if n != OURS},
        "overhead_over_loop": ours / medians["loop"] - 1 if ours and "loop" in medians else None,
        "rounds": rounds,
        "first_round": of_each({n: p.seconds[0] for n, p in good.items()}),
        "seconds": of_each({n: p.seconds[1:] for n, p in good.items()}),
        "peak_memory_mb": of_each({n: p.peak for n, p in good.items()}),
        "device_memory_mb": of_each({n: p.facts.get("device_memory_mb") for n, p in good.items()}),
        "reasons": dict(reasons),
        "overrides": [o if isinstance(o, str) else f"{o[0]}={o[1]}" for o in work],
        "engine": good[OURS].facts.get("engine") if OURS in good else None,
        "machine": machine(next((f["gpu"] for f in facts if f.get("gpu")), None)),
    }


def machine(gpu: str | None) -> dict[str, Any]:
    """What was measured on; nothing about whose it is."""
    try:
        pfl: str | None = importlib.metadata.version("pfl")
    except importlib.metadata.PackageNotFoundError:
        pfl = None
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cpu": cpu_model(),
        "cpus_usable": usable_cpus(),
        "gpu": gpu,
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {**versions(), "pfl": pfl},
        "source_revision": source_revision(),
    }

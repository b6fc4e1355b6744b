"""What a run costs, from what its nodes report of each call: ``costs.csv``, two sections of ``summary.json``, events.

``costs`` is what every machine and runtime finds alike: floats, bytes, FLOPs, bytes held. ``measured`` is what this
machine took: seconds and peaks of memory. Records are plain JSON, so that a resumed run goes on with them.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..federation.bytes import nbytes
from ..federation.ledger import exemplar_bytes, peak_memory

if TYPE_CHECKING:
    from ..federation.node import Node
    from ..federation.server import State

COSTS_CSV = "costs.csv"
TRAFFIC = ("floats_up", "floats_down", "bytes_up", "bytes_down")
COLUMNS = ("task", "round", "clients", "steps", *TRAFFIC, "flops", "flops_max", "seconds", "seconds_max")
"""Of ``costs.csv``: ``flops`` and ``seconds`` are sums over a round's clients, ``_max`` those of the busiest one."""

Records = dict[str, Any]
Row = list[int | float | None]


def begin() -> Records:
    """The records of a run that has done nothing yet."""
    return {"rounds": [], "tasks": [], "peak": [0, None]}


def add_round(
    records: Records | None, task: int, round_: int, measured: Mapping[str, Any]
) -> tuple[Records | None, dict[str, list[Any]]]:
    """The records with a round of training, and what each of its clients did.

    Args:
        records: None where the run began without any; it stays without.
        measured: what the nodes reported, merged; ``counted`` holds the FLOPs of a step by shape, those that are known.

    Returns:
        New records; lists ``clients``, ``steps``, ``flops`` and ``seconds``, one entry a client that took a step,
        FLOPs None where they could not be counted.
    """
    counted: Mapping[str, int | None] = measured["counted"]
    work = sorted((entry for entry in measured.get("work", []) if entry[2]), key=lambda entry: entry[0])
    flops = [_flops(shapes, counted) for _, _, shapes in work]
    seconds = [round(float(spent), 6) for _, spent, _ in work]
    steps = [sum(shapes.values()) for _, _, shapes in work]
    did = {"clients": [client for client, *_ in work], "steps": steps, "flops": flops, "seconds": seconds}
    if records is None:
        return None, did
    row: Row = [
        task, round_, len(work), sum(steps), *(measured[name] for name in TRAFFIC),
        _sum(flops), None if None in flops else _most(flops) or 0, sum(seconds), max(seconds, default=0.0),
    ]  # fmt: skip
    peak = [_most([records["peak"][i], *(one[i] for one in measured.get("peak", []))]) for i in (0, 1)]
    return {**records, "rounds": [*records["rounds"], row], "peak": peak}, did


def uncounted(measured: Mapping[str, Any]) -> list[str]:
    """A line for each shape of batch whose FLOPs a node tried to count in a round and could not."""
    return [
        f"the FLOPs of a step on {key.rpartition(':')[2]} images are unknown: {why}"
        for key, count, why in measured.get("flops", [])
        if count is None
    ]


def add_task(records: Records | None, meter: Mapping[str, Any]) -> Records | None:
    """The records with the totals that stand at the end of a task; ``meter`` is a state of the byte meter."""
    if records is None:
        return None
    total = [meter["floats_up"], meter["floats_down"], meter["up"], meter["down"], meter["asked"]]
    return {**records, "tasks": [*records["tasks"], total]}


def _flops(shapes: Mapping[str, int], counted: Mapping[str, int | None]) -> int | None:
    each = [(counted.get(name), steps) for name, steps in shapes.items()]
    found: int | None = _sum(None if flops is None else steps * flops for flops, steps in each)
    return found


def _sum(values: Iterable[Any]) -> Any:
    values = list(values)
    return None if None in values else sum(values)


def _most(values: Iterable[int | None]) -> int | None:
    return max((v for v in values if v is not None), default=None)


def _tasks(records: Records) -> list[list[Row]]:
    """For each finished task its rounds, then what happened outside of them."""
    found = []
    before = [0, 0, 0, 0, 0.0]
    for task, total in enumerate(records["tasks"]):
        rounds = [row for row in records["rounds"] if row[0] == task]
        spent = [now - then for now, then in zip(total, before, strict=True)]
        apart = [spent[i] - sum(row[4 + i] for row in rounds) for i in range(4)]
        found.append([*rounds, [task, None, None, None, *apart, None, None, round(spent[4], 6), None]])
        before = total
    return found


def costs_csv(records: Records | None, centralised: bool) -> bytes:
    """``costs.csv``: a row for each round, and one without a round for what a task's exchanges outside of rounds took.

    Args:
        centralised: nothing travels that a federation would send: these cells are empty.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for rows in _tasks(records) if records else []:
        for row in rows:
            kept = [None if centralised and 4 <= i < 8 else cell for i, cell in enumerate(row)]
            writer.writerow(["" if cell is None else cell for cell in kept])
    return text.getvalue().encode()


@dataclass(frozen=True)
class Held:
    """Bytes held at the end of a run.

    Attributes:
        model: parameters and buffers of the global model.
        state_clients, state_server: states of strategies, at the server with the previous model where it is kept;
            where exemplars are rows of a store, the rows and not the images.
        exemplars_clients, exemplars_server: images that strategies keep.
    """

    model: int
    state_clients: int
    state_server: int
    exemplars_clients: int
    exemplars_server: int


def held_at_end(node: Node, state: State, clients: Sequence[tuple[int, int]]) -> Held:
    """What model, server and clients hold.

    Args:
        clients: (bytes of the state, bytes of exemplars) of every client that has a state.
    """
    server = {f"{name}/{n}": a for name, arrays in state.strategies.items() for n, a in arrays.items()}
    kept = sum(exemplar_bytes(node, s.name, server) for s in node.stack)
    return Held(
        nbytes(state.model), sum(size for size, _ in clients), nbytes(server) + nbytes(state.previous),
        sum(images for _, images in clients), kept,
    )  # fmt: skip


def sections(
    records: Records | None, held: Held, centralised: bool, node: Node
) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """The sections ``costs`` and ``measured`` of the summary, and the dotted names of what is None in them."""
    tasks = _tasks(records) if records else []
    rows = [row for task in tasks for row in task if row[1] is not None]
    peak = records["peak"] if records else [None, None]
    known = bool(tasks)
    costs = {
        **(_columns([row for task in tasks for row in task], centralised) if known else dict.fromkeys(TRAFFIC)),
        "flops": _sum(row[8] for row in rows) if known else None,
        "flops_per_client_round": _per_client([row[8] for row in rows], [row[9] for row in rows], rows),
        "per_task": [{**_columns(task, centralised), "flops": _sum(r[8] for r in task[:-1])} for task in tasks],
        "model_bytes": held.model,
        "state_bytes": {"clients": held.state_clients, "server": held.state_server},
        # A bound reads all images it likes: what it keeps is no memory.
        "exemplar_bytes": {
            "clients": None if centralised else held.exemplars_clients,
            "server": None if centralised else held.exemplars_server,
        },
        "memory_bytes": None if centralised else held.model + held.exemplars_clients + held.exemplars_server,
    }
    measured = {
        "client_seconds": _sum(row[10] for row in rows) if known else None,
        "client_seconds_per_round": _per_client([row[10] for row in rows], [row[11] for row in rows], rows),
        "exchange_seconds": sum(task[-1][10] or 0.0 for task in tasks) if known else None,
        "per_task": [
            {"client_seconds": _sum(r[10] for r in task[:-1]), "exchange_seconds": task[-1][10]} for task in tasks
        ],
        "peak_bytes": {"node": peak[0], "cuda": peak[1], "server": peak_memory(node.store.device)[0]},
    }
    return costs, measured, [*_named("costs", costs), *_named("measured", measured)]


def _columns(rows: list[Row], centralised: bool) -> dict[str, Any]:
    return {name: None if centralised else _sum(row[4 + i] for row in rows) for i, name in enumerate(TRAFFIC)}


def _per_client(sums: list[Any], most: list[Any], rows: list[Row]) -> dict[str, Any]:
    """Mean and maximum over the clients and rounds that took a step."""
    clients = sum(int(row[2] or 0) for row in rows)
    total = _sum(sums)
    if not clients or total is None:
        return {"mean": None, "max": None}
    return {"mean": total / clients, "max": max(most)}


def _named(place: str, values: Any) -> list[str]:
    if isinstance(values, Mapping):
        return [name for key, value in values.items() for name in _named(f"{place}.{key}", value)]
    if isinstance(values, list):
        return sorted({name for value in values for name in _named(place, value)})
    return [place] if values is None else []

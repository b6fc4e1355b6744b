"""What is odd about a split: one line each for `fedcl split`, one for all of it at the start of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..stream import Ids, Split, Stream, untested_note


def split_warnings(split: Split, stream: Stream, class_names: Sequence[str] = ()) -> list[str]:
    """One line a problem: clients that are absent, that hold no image or none of a new class (in a task), that never
    see a class; classes that nobody holds.

    Of a drawn population one line says what it is; whether some client is empty would need all of them.
    """
    if split.rule:
        return [
            *untested_note(stream),
            f"partition.size: each of the {split.clients} clients draws its images independently of the others, so two "
            "may hold the same image, and an image may belong to nobody",
        ]
    counts, unit = split.held_counts(), "task" if split.own_clocks is None else "stage"
    lines = untested_note(stream)
    for stage, odd in zip(stream.stages, oddities(split, stream, counts), strict=True):
        if odd.absent:
            verb = "client is" if len(odd.absent) == 1 else "clients are"
            lines.append(f"{unit} {stage.index + 1}: {len(odd.absent)} {verb} absent: {some_of(odd.absent)}")
        if odd.empty:
            verb = "client holds" if len(odd.empty) == 1 else "clients hold"
            lines.append(f"{unit} {stage.index + 1}: {len(odd.empty)} {verb} no training image: {some_of(odd.empty)}")
        if odd.untested:
            lines.append(f"{unit} {stage.index + 1}: no personal test image for client {some_of(odd.untested)}")
        if odd.old:
            verb = "client holds" if len(odd.old) == 1 else "clients hold"
            told = f"{len(odd.old)} {verb} images, but none of a new class: {some_of(odd.old)}"
            lines.append(f"{unit} {stage.index + 1}: {told}")
        lines += nobodys(split, stream, stage.index, counts[stage.index], class_names)
    never = np.flatnonzero(counts.sum(axis=(0, 2)) == 0).tolist()
    if never and stream.num_tasks > 1:
        lines.append(f"clients without a training image in any task: {some_of(never)}")
    missing = unseen_classes(counts)
    if missing:
        told = some_of([f"{client} ({count})" for client, count in missing])
        lines.append(f"clients that never hold an image of some class (how many classes): {told}")
    lines += unnamed_classes(split, stream, class_names)
    for task, bare in without_label(split):
        then = "they train on images alone" if split.self_supervised else "they do not train"
        told = "all" if len(bare) == split.clients else some_of(bare)
        noun = "client has" if len(bare) == 1 else "clients have"
        lines.append(f"task {task + 1}: {len(bare)} {noun} images but no label, {then}: {told}")
    return lines


def split_notes(split: Split, stream: Stream, class_names: Sequence[str] = ()) -> list[str]:
    """The same in short, for the start of a run: what concerns the numbers, and one line that counts clients."""
    if split.rule:
        return split_warnings(split, stream, class_names)
    counts = split.held_counts()
    odd = oddities(split, stream, counts)
    lines = untested_note(stream)
    for stage in stream.stages:
        lines += nobodys(split, stream, stage.index, counts[stage.index], class_names)
    lines += unnamed_classes(split, stream, class_names)
    then = "and train on images alone" if split.self_supervised else "and do not train then"
    parts = [
        ("absent in some task", [o.absent for o in odd]),
        ("without a training image in some task", [o.empty for o in odd]),
        ("without a test image of their own in some task", [o.untested for o in odd]),
        ("without a new class in some task", [o.old for o in odd]),
        ("without a training image of some class in any task", [[k for k, _ in unseen_classes(counts)]]),
        (f"without a label in some task {then}", [bare for _, bare in without_label(split)]),
    ]
    found = [(what, len({k for clients in by_task for k in clients})) for what, by_task in parts]
    told = [f"{count} {what}" for what, count in found if count]
    return [*lines, f"of {split.clients} clients {', '.join(told)}; see `fedcl split`"] if told else lines


@dataclass(frozen=True)
class Oddities:
    """Clients of one task: absent; there without an image; with images, but no test image of their own; with images,
    but none of a new class."""

    absent: list[int]
    empty: list[int]
    untested: list[int]
    old: list[int]


def oddities(split: Split, stream: Stream, counts: Ids) -> list[Oddities]:
    """For each task of a complete split.

    Args:
        counts: (T, K, C) training images.
    """
    found = []
    for stage, empty in enumerate(split.empty):
        there = set(split.present(stage))
        tests = [] if split.test is None else split.test[stage]
        found.append(
            Oddities(
                [k for k in range(split.clients) if k not in there],
                [k for k in empty if k in there],
                [k for k, ids in enumerate(tests) if len(ids) == 0 and len(split.train[stage][k]) > 0],
                nothing_new(split, stream, stage, counts[stage]),
            )
        )
    return found


def nobodys(split: Split, stream: Stream, stage: int, counts: Ids, class_names: Sequence[str]) -> list[str]:
    """One line on the classes that a task brings to all and of which nobody holds an image.

    Args:
        counts: (K, C) training images in the task.
    """
    held = counts.sum(axis=0)
    missing = [c for c in stream.stages[stage].classes if held[c] == 0]
    if split.own_clocks is not None or not missing:
        return []
    return [f"task {stage + 1}: no client holds class {some_of([class_name(stream, c, class_names) for c in missing])}"]


def nothing_new(split: Split, stream: Stream, stage: int, counts: Ids) -> list[int]:
    """Clients that hold images in a task, but none of a class that is new to them; none where a stream brings no class.

    Args:
        counts: (K, C) training images in the task.
    """
    clocks = split.own_clocks
    if clocks is None:
        new = [stream.stages[stage].classes] * split.clients
    else:
        new = [clocks.new(stage, client) for client in range(split.clients)]
    if not any(new):
        return []
    return [k for k in range(split.clients) if counts[k].any() and not counts[k][list(new[k])].any()]


def unseen_classes(counts: Ids) -> list[tuple[int, int]]:
    """(client, how many classes) of the clients that hold images, but none of some class that others hold.

    Args:
        counts: (T, K, C) training images.
    """
    held = counts.sum(axis=0) > 0
    missing = held.any(axis=0) & ~held
    return [(k, int(missing[k].sum())) for k in np.flatnonzero(held.any(axis=1)).tolist() if missing[k].any()]


def unnamed_classes(split: Split, stream: Stream, class_names: Sequence[str]) -> list[str]:
    """One line on the classes that are to be learned and of which nobody has a label."""
    if split.unlabelled is None:
        return []
    labelled, without = (counts.sum(axis=(0, 1)) for counts in (split.counts(), split.unlabelled_counts()))
    names = {c: class_name(stream, c, class_names) for c in stream.known(stream.num_tasks - 1)}
    lost = [names[c] for c in np.flatnonzero((labelled == 0) & (without > 0)).tolist() if c in names]
    return [f"no client has a label of class {some_of(lost)}"] if lost and labelled.any() else []


def without_label(split: Split) -> list[tuple[int, list[int]]]:
    """(task, clients that have images but no label), where there are any."""
    if split.unlabelled is None:
        return []
    both = zip(split.rows, split.unlabelled, strict=True)
    found = [[c for c, ids in enumerate(rows) if not len(ids) and len(others[c])] for rows, others in both]
    return [(task, bare) for task, bare in enumerate(found) if bare]


def class_name(stream: Stream, position: int, class_names: Sequence[str]) -> str:
    original = stream.class_order[position]
    return class_names[original] if class_names else str(original)


def some_of(items: Sequence[object]) -> str:
    text = ", ".join(str(item) for item in items[:10])
    return text + (f" and {len(items) - 10} more" if len(items) > 10 else "")

"""What is odd about a split, one line each, for `fedcl split` and at the start of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from .stream import Ids, Split, Stream, untested_note


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
    for stage in stream.stages:
        there = split.present(stage.index)
        if absent := [k for k in range(split.clients) if k not in there]:
            verb = "client is" if len(absent) == 1 else "clients are"
            lines.append(f"{unit} {stage.index + 1}: {len(absent)} {verb} absent: {some_of(absent)}")
        if empty := [k for k in split.empty[stage.index] if k in there]:
            verb = "client holds" if len(empty) == 1 else "clients hold"
            lines.append(f"{unit} {stage.index + 1}: {len(empty)} {verb} no training image: {some_of(empty)}")
        if split.test is not None:
            untested = [
                client
                for client, ids in enumerate(split.test[stage.index])
                if len(ids) == 0 and len(split.train[stage.index][client]) > 0
            ]
            if untested:
                lines.append(f"{unit} {stage.index + 1}: no personal test image for client {some_of(untested)}")
        if old := nothing_new(split, stream, stage.index, counts[stage.index]):
            verb = "client holds" if len(old) == 1 else "clients hold"
            lines.append(f"{unit} {stage.index + 1}: {len(old)} {verb} images, but none of a new class: {some_of(old)}")
        held = counts[stage.index].sum(axis=0)
        if split.own_clocks is None and (missing := [c for c in stage.classes if held[c] == 0]):
            names = [class_name(stream, c, class_names) for c in missing]
            lines.append(f"{unit} {stage.index + 1}: no client holds class {some_of(names)}")
    never = np.flatnonzero(counts.sum(axis=(0, 2)) == 0).tolist()
    if never and stream.num_tasks > 1:
        lines.append(f"clients without a training image in any task: {some_of(never)}")
    known = {c: class_name(stream, c, class_names) for c in stream.known(stream.num_tasks - 1)}
    return [*lines, *unseen_classes(counts), *label_notes(split, known)]


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


def unseen_classes(counts: Ids) -> list[str]:
    """One line on the clients that hold images, but none of some class that others hold.

    Args:
        counts: (T, K, C) training images.
    """
    held = counts.sum(axis=0) > 0
    missing = held.any(axis=0) & ~held
    found = [(k, int(missing[k].sum())) for k in np.flatnonzero(held.any(axis=1)).tolist() if missing[k].any()]
    if not found:
        return []
    told = some_of([f"{client} ({count})" for client, count in found])
    return [f"clients that never hold an image of some class (how many classes): {told}"]


def label_notes(split: Split, names: Mapping[int, str]) -> list[str]:
    """One line a task and problem: clients without a labelled image and what becomes of them, classes of which
    nobody has a label.

    Args:
        names: of the classes that are to be learned, by position.
    """
    if split.unlabelled is None or split.rule:
        return []
    lines = []
    labelled, without = (counts.sum(axis=(0, 1)) for counts in (split.counts(), split.unlabelled_counts()))
    lost = [names[c] for c in np.flatnonzero((labelled == 0) & (without > 0)).tolist() if c in names]
    if lost and labelled.any():
        lines.append(f"no client has a label of class {some_of(lost)}")
    for task, (rows, others) in enumerate(zip(split.rows, split.unlabelled, strict=True)):
        bare = [c for c, ids in enumerate(rows) if not len(ids) and len(others[c])]
        if not bare:
            continue
        then = "they train on images alone" if split.self_supervised else "they do not train"
        told = "all" if len(bare) == split.clients else some_of(bare)
        noun = "client has" if len(bare) == 1 else "clients have"
        lines.append(f"task {task + 1}: {len(bare)} {noun} images but no label, {then}: {told}")
    return lines


def class_name(stream: Stream, position: int, class_names: Sequence[str]) -> str:
    original = stream.class_order[position]
    return class_names[original] if class_names else str(original)


def some_of(items: Sequence[object]) -> str:
    text = ", ".join(str(item) for item in items[:10])
    return text + (f" and {len(items) - 10} more" if len(items) > 10 else "")

"""What the section ``time`` may say beside others (no torch)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import UsageError
from .schema import Time

if TYPE_CHECKING:
    from .schema import Config


def check_time(config: Config) -> None:
    """Refuses settings of ``time`` that cannot be met, or that others exclude.

    Raises:
        UsageError: naming the key, its value and what is allowed.
    """
    time = config.time
    for key, order in (("sequence", "asynchronous"), ("classes", "client_specific"), ("shared", "client_specific")):
        if time.order != order and getattr(time, key) != getattr(Time, key):
            raise UsageError(f"time.{key}", getattr(time, key), f"is read with time.order={order} only")
    if time.joining + time.leaving > 1:
        allowed = "must add up to at most 1: a client either comes late or leaves early"
        raise UsageError("time.joining, time.leaving", (time.joining, time.leaving), allowed)
    if time.growth and not time.start:
        raise UsageError("time.start", time.start, "must say how many clients there are in the first task with growth")
    if time.start and (time.joining or time.leaving):
        allowed = "must be 0 with time.joining or time.leaving: a federation either grows or loses and gains clients"
        raise UsageError("time.start", time.start, allowed)
    if time.start > config.federation.clients:
        allowed = f"must not be above federation.clients={config.federation.clients}"
        raise UsageError("time.start", time.start, allowed)
    if config.partition.size and (time.order != "common" or time.joining or time.leaving or time.start):
        allowed = "must be 0 with tasks or times of the clients' own (section time), which need every client's stream"
        raise UsageError("partition.size", config.partition.size, allowed)
    if config.partition.size and time.participation < 1:
        allowed = "must be 1 with partition.size; use federation.participation or federation.cohort"
        raise UsageError("time.participation", time.participation, allowed)
    if time.order == "common":
        return
    if "task_incremental" in (config.scenario.name, *config.scenario.of):
        allowed = "must be common with task_incremental: the task of an image is that of the common stream"
        raise UsageError("time.order", time.order, allowed, ("common",))
    evaluate = config.evaluate
    common = f"with time.order={time.order}: probes learn from tasks that all clients have in common"
    if evaluate.probes:
        raise UsageError("evaluate.probes", evaluate.probes, f"must be [] {common}")
    if evaluate.features:
        raise UsageError("evaluate.features", evaluate.features, f"must be 0 {common}")
    if evaluate.predict not in ("auto", "head"):
        raise UsageError("evaluate.predict", evaluate.predict, f"must be head {common}", ("head",))
    if time.order == "client_specific" and config.partition.min_size:
        allowed = "must be 0 with time.order=client_specific: each class is dealt to the clients that have it"
        raise UsageError("partition.min_size", config.partition.min_size, allowed)

"""What ``federation.passes`` allows of the other settings; checked before anything heavy is imported."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import UsageError

if TYPE_CHECKING:
    from .schema import Federation


def check_passes(federation: Federation) -> None:
    """Refuses more than one epoch of a single pass, and repeats without one.

    Raises:
        UsageError: naming the key.
    """
    if federation.passes == "many":
        if federation.repeats != 1:
            raise UsageError("federation.repeats", federation.repeats, "is only read with federation.passes=once")
    elif federation.epochs != 1:
        key, least = ("epochs", "1") if federation.steps is None else ("steps", "null, and federation.epochs 1,")
        allowed = f"must be {least} with federation.passes=once, which shows each image once; federation.repeats says "
        allowed += "how often each batch is trained on"
        raise UsageError(f"federation.{key}", getattr(federation, key), allowed)

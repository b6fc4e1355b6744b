"""Which arrays of the model are averaged, which stay at a client, and which never change."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import RunFailed
from ..local.blame import blame
from ..strategy import Sharing

if TYPE_CHECKING:
    from .node import Node


def sharing_of(node: Node, name: str) -> Sharing:
    """What an array of the model is, by the BatchNorm policy and the strategies; the first that does not share decides.

    Raises:
        RunFailed: a strategy answers something else.
    """
    if name in node.constant:
        return "frozen"
    if name in node.buffers and node.config.model.batch_norm != "average":
        return "private" if node.config.model.batch_norm == "local" else "frozen"
    for strategy in node.stack:
        with blame(strategy, "share"):
            answer = strategy.share(name, node.model)
        if answer not in ("shared", "private", "frozen"):
            raise RunFailed(
                f"strategy {strategy.name!r}: share({name!r}) returned {answer!r}; allowed are shared, private, frozen"
            )
        if answer != "shared":
            return answer
    return "shared"

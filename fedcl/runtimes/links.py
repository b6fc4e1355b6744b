"""The server's end of the exchanges: which nodes there are, messages to them, their replies in order.

Client k lives on node ``k mod nodes``. Flower's node ids are random, so nodes introduce themselves at the start of a
run and are numbered by their ``partition-id``.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..errors import Interrupted, RunFailed
from ..federation.call import Call, Reply, prefixed
from ..federation.flower_internals import ConfigRecord, Message, RecordDict, failure_text, make_message, pack, unpack
from .setup import Setup, check_places, images_digest

if TYPE_CHECKING:
    import torch

    from ..federation.flower_internals import Grid
    from ..federation.node import Node
    from ..strategy import Arrays

INITIAL = "_initial/"


class NodeLost(RunFailed):
    """A node failed or vanished: what was complete before is saved, and the run can go on later."""


class Links:
    """All nodes of a run.

    Args:
        token: the run, for nodes in this process and for what a worker keeps.
        node: the server's own view of model and settings.
        setup: what nodes elsewhere are built from; None where the only node is in this process.
        log: told of events.

    Attributes:
        sent: messages so far.
    """

    grid: Grid

    def __init__(self, token: str, node: Node, setup: Setup | None, log: Callable[[dict[str, object]], None]) -> None:
        self.token, self.node, self.setup, self.log = token, node, setup, log
        self.sent = 0
        self._kept: list[int] = []
        self._outdated: set[int] = set()
        self._ids: list[int] = []
        self._initial: Arrays = {}

    def open(self, grid: Grid, sequence: int, say: Callable[[str], None]) -> None:
        """Waits for the nodes, asks who they are, and numbers them.

        Args:
            grid: Flower's way to the nodes.
            sequence: exchanges the run has had; newer client states are discarded.
            say: told once when nodes are awaited.

        Raises:
            RunFailed: nodes are missing, hold other images, or are not those the run began with.
        """
        self.grid = grid
        if self.setup:
            # What is a client's own starts from the server's model, which may come from a file that only it has.
            own = {n: a for n, a in self.node.initial.items() if n in self.node.private}
            self._initial = prefixed(own, INITIAL)
        wanted = self.node.config.engine.nodes if self.setup else 1
        ids = wait_for_nodes(self.grid, wanted, self.node.config.engine.timeout, self.node.stop, say)
        asked = {i: self._message(node, "query.hello", {}, {"sequence": sequence}) for i, node in enumerate(ids)}
        replies = self._exchange(asked, "hello")
        known = [(json.loads(str(replies[i].content["reply"]["facts"])), node) for i, node in enumerate(ids)]
        known.sort(key=lambda pair: (pair[0]["partition"] is None, pair[0]["partition"] or 0, pair[1]))
        known = known[:wanted]
        self._ids = [node for _, node in known]
        nodes = [facts for facts, _ in known]
        self.log({"event": "nodes", "nodes": nodes})
        if self.setup:
            self._check(nodes, sequence)

    def _check(self, nodes: list[dict[str, Any]], sequence: int) -> None:
        partitions = [n["partition"] for n in nodes if n["partition"] is not None]
        if len(set(partitions)) < len(partitions):
            raise RunFailed(f"two nodes have the same partition-id: they are {partitions}")
        images = [images_digest(self.node.store), images_digest(self.node.test)]
        for number, facts in enumerate(nodes):
            if facts["version"] != __version__:
                raise RunFailed(f"node {number} has fedcl {facts['version']}, the server has {__version__}")
            if facts["images"] != images:
                name = self.node.config.data.name
                raise RunFailed(f"node {number} holds other images of data.name={name!r} than the server")
        if self.setup and self.setup.states is None:
            check_places(nodes, sequence)

    def send(self, call: Call) -> Iterable[Reply]:
        """Sends a call to the nodes that host its clients; their replies in the order of the nodes.

        Raises:
            NodeLost: a node failed, vanished, or did not answer within ``engine.timeout``.
            Interrupted: the user asked to stop.
        """
        count = len(self._ids)
        messages = {}
        action = "train" if call.header.function == "train" else "query.ask"
        for number, node in enumerate(self._ids):
            mine = [c for c in call.header.clients if c % count == number]
            if mine:
                part = call if count == 1 else call.restricted(mine)
                messages[number] = self._message(
                    node, action, part.arrays() | self._initial, {"place": number}, part.header.to_json()
                )
        replies = self._exchange(messages, call.header.function)
        found = [_decoded(replies.pop(number), self.node.store.device) for number in messages]
        return in_client_order(found)

    def keep(self, sequences: list[int]) -> None:
        """Tells each node, with its next message, after which exchanges client states are still needed.

        To be called between two exchanges, when a checkpoint has been saved: what it needs is then the newest.
        """
        self._kept, self._outdated = sequences, set(self._ids)

    def digests(self, sequence: int) -> list[tuple[int, bytes, int, int]]:
        """Every client that has a state, ascending: (client, digest, bytes of it, bytes of its exemplars).

        Args:
            sequence: the exchange after which the states are asked for.
        """
        asked = {
            number: self._message(node, "query.digest", {}, {"sequence": sequence, "place": number})
            for number, node in enumerate(self._ids)
        }
        replies = self._exchange(asked, "digest")
        found = [json.loads(str(reply.content["reply"]["facts"])) for reply in replies.values()]
        return sorted((client, bytes.fromhex(digest), *held) for told in found for client, digest, *held in told)

    def _message(self, node: int, action: str, arrays: Arrays, facts: Mapping[str, int], header: str = "") -> Message:
        setup = ""
        if self.setup:
            outdated = self.setup.states is None and node in self._outdated
            setup = self.setup.with_kept(self._kept if outdated else None).to_json()
            self._outdated.discard(node)
        record = {"run": self.token, "setup": setup, "header": header, "nodes": len(self._ids), **facts}
        return make_message(RecordDict({"arrays": pack(arrays), "call": ConfigRecord(record)}), node, action)

    def _exchange(self, messages: dict[int, Message], function: str) -> dict[int, Message]:
        """The replies by node number; the first failure ends the exchange."""
        timeout, stop = self.node.config.engine.timeout, self.node.stop
        accepted = {name for name in self.grid.push_messages(list(messages.values())) if name}
        self.sent += len(messages)
        waiting = {message.metadata.message_id: number for number, message in messages.items()}
        for name, number in waiting.items():
            if name not in accepted:
                raise NodeLost(f"node {number} is gone: the message {function!r} could not be delivered")
        end = time.monotonic() + timeout
        replies: dict[int, Message] = {}
        while True:
            for reply in self.grid.pull_messages(list(waiting)):
                name = reply.metadata.reply_to_message_id
                if name in waiting:
                    number = waiting.pop(name)
                    self._refuse(reply, number, function)
                    replies[number] = reply
            if not waiting:
                return replies
            if stop():
                raise Interrupted("interrupted")
            if time.monotonic() >= end:
                late = ", ".join(str(n) for n in sorted(waiting.values()))
                raise NodeLost(f"node {late} did not answer {function!r} within engine.timeout={timeout:g} s")
            time.sleep(getattr(self.grid, "pause", 0.2))

    def _refuse(self, reply: Message, number: int, function: str) -> None:
        if reply.has_error():
            raise NodeLost(f"node {number} {failure_text(reply)} in {function!r}")
        if "failure" in reply.content:
            told = reply.content["failure"]
            self.log({"event": "node_failed", "node": number, "trace": str(told["trace"])})
            raise RunFailed(f"node {number} failed in {function!r}: {told['error']}")


def _decoded(message: Message, device: torch.device) -> Reply:
    facts = message.content["reply"]
    arrays = unpack(message.content["arrays"], device)
    return Reply(arrays, json.loads(str(facts["facts"])), json.loads(str(facts["measured"])))


def in_client_order(replies: list[Reply]) -> list[Reply]:
    """The same replies with single clients' arrays and weights in the order of the clients, all in the first reply.

    A rule that sees clients one by one (the reduction ``stack``) may sum over them, so their order decides bits.
    Arrays that only some clients sent stay in the order of the nodes.
    """
    if len(replies) < 2 and all(r.facts["clients"] == sorted(r.facts["clients"]) for r in replies):
        return replies
    order = sorted((client, at, i) for at, r in enumerate(replies) for i, client in enumerate(r.facts["clients"]))
    first, arrays = replies[0], [dict(reply.arrays) for reply in replies]
    moved: Arrays = {}
    counts: dict[str, int] = {}
    for name in dict.fromkeys(n for r in replies for n, fact in r.facts["entries"].items() if fact["parts"]):
        if all(r.facts["entries"].get(name, {"parts": 0})["parts"] == len(r.facts["clients"]) for r in replies):
            moved |= {f"{name}#{place}": arrays[at].pop(f"{name}#{i}") for place, (_, at, i) in enumerate(order)}
            counts[name] = len(order)
    weights = [replies[at].facts["weights"][i] for _, at, i in order]
    out = []
    for at, reply in enumerate(replies):
        entries = {n: {**fact, "parts": 0} if n in counts else fact for n, fact in reply.facts["entries"].items()}
        if reply is first:
            dtypes = {n: f["dtype"] for r in replies for n, f in r.facts["entries"].items()}
            entries |= {n: {"dtype": dtypes[n], "weight": 0.0, "parts": count} for n, count in counts.items()}
        facts = {**reply.facts, "entries": entries, "weights": weights if reply is first else []}
        out.append(Reply(arrays[at] | (moved if reply is first else {}), facts, reply.measured))
    return out


def wait_for_nodes(
    grid: Grid, wanted: int, timeout: float, stop: Callable[[], bool], say: Callable[[str], None]
) -> list[int]:
    """Flower's ids of the nodes, once there are ``wanted`` of them.

    Raises:
        RunFailed: not within ``timeout`` seconds.
        Interrupted: the user asked to stop.
    """
    end = time.monotonic() + timeout
    ids = list(grid.get_node_ids())
    if len(ids) < wanted:
        say(f"waiting for {wanted} nodes; {len(ids)} are there")
    while len(ids) < wanted:
        if stop():
            raise Interrupted("interrupted")
        if time.monotonic() >= end:
            raise RunFailed(f"{len(ids)} of {wanted} nodes were there after engine.timeout={timeout:g} s")
        time.sleep(0.2)
        ids = list(grid.get_node_ids())
    return ids


def count_nodes(grid: Grid, timeout: float) -> int:
    """How many nodes there are, once there is one.

    Raises:
        RunFailed: none came within ``timeout`` seconds.
    """
    return len(wait_for_nodes(grid, 1, timeout, lambda: False, lambda text: None))

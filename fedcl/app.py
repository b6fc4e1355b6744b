"""The Flower app: one ServerApp and one ClientApp, whatever the runtime.

A node hosts clients. One message carries a call (:mod:`fedcl.federation.call`) for all clients of a node, the reply
their partial sums. In the server's process the apps find what they need under a run's token. Elsewhere a node is
built from what the message says (:mod:`fedcl.runtimes.setup`); what a process keeps of it only saves time.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable
from typing import Any

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from .errors import FedclError
from .federation.call import Call, Header, below
from .federation.flower_internals import pack, reply, unpack
from .federation.ledger import holdings
from .federation.node import Node
from .records.hashing import arrays_digest
from .runtimes.links import INITIAL
from .runtimes.setup import Setup, build_node, introduce, take_place

TOKEN = "fedcl-run"
NODES: dict[str, Node] = {}
"""Nodes of this process by run token, and by node too where they are not the server's own."""

MAINS: dict[str, Callable[[Grid], None]] = {}
"""Server loops of this process by run token."""

client = ClientApp()
server = ServerApp()

Facts = dict[str, Any]


def client_app() -> ClientApp:
    """The ClientApp, for workers that load it by name."""
    return client


@server.main()  # type: ignore[untyped-decorator]  # flwr is not followed by the type checker
def main(grid: Grid, context: Context) -> None:
    """Runs the server loop of the run that the context names, or the run that a SuperLink was given."""
    token = str(context.run_config.get(TOKEN, ""))
    if token in MAINS:
        MAINS[token](grid)
        return
    from .runtimes.deploy import serve

    serve(grid, context.run_config)


@client.train()  # type: ignore[untyped-decorator]  # flwr is not followed by the type checker
def train(message: Message, context: Context) -> Message:
    """A round of local training."""
    return answered(message, context, called)


@client.query("ask")  # type: ignore[untyped-decorator]  # flwr is not followed by the type checker
def ask(message: Message, context: Context) -> Message:
    """A call of a strategy's own function."""
    return answered(message, context, called)


@client.query("hello")  # type: ignore[untyped-decorator]  # flwr is not followed by the type checker
def hello(message: Message, context: Context) -> Message:
    """Who this node is, and what it holds."""

    def act(node: Node, facts: Facts, message: Message) -> RecordDict:
        setup = Setup.from_json(facts["setup"]) if facts["setup"] else None
        told = {"partition": 0} if setup is None else introduce(node, setup, context.node_config, facts["sequence"])
        return RecordDict({"reply": ConfigRecord({"facts": json.dumps(told)})})

    return answered(message, context, act)


@client.query("digest")  # type: ignore[untyped-decorator]  # flwr is not followed by the type checker
def digest(message: Message, context: Context) -> Message:
    """SHA-256 of the states of this node's clients, and what they hold; see :meth:`Links.digests`."""

    def act(node: Node, facts: Facts, message: Message) -> RecordDict:
        mine = [c for c in node.clients.clients() if c % facts["nodes"] == facts["place"]]
        told = []
        for client in mine:
            state = node.clients.get(client, facts["sequence"])
            told.append((client, arrays_digest(state).hex(), *holdings(node, state)))
        return RecordDict({"reply": ConfigRecord({"facts": json.dumps(told)})})

    return answered(message, context, act)


def called(node: Node, facts: Facts, message: Message) -> RecordDict:
    """Decodes a call, lets the node answer it, and encodes what it answers."""
    arrays = unpack(message.content["arrays"], node.store.device)
    if facts["setup"]:
        node.initial = node.initial | below(arrays, INITIAL)
    call = Call.of(Header.from_json(facts["header"]), arrays)
    result = node.handle(call)
    silent = {*result.measured.get("idle", ()), *result.measured.get("empty", ())}
    train = call.header.function == "train"
    turn = call.header.in_turn(call.header.clients) if train else call.header.clients
    told = {**result.facts, "clients": [c for c in turn if c not in silent]}
    record = ConfigRecord({"facts": json.dumps(told), "measured": json.dumps(result.measured)})
    return RecordDict({"arrays": pack(result.arrays), "reply": record})


def answered(message: Message, context: Context, act: Callable[[Node, Facts, Message], RecordDict]) -> Message:
    """The reply to a message; at a node outside the server's process an error is a reply too."""
    facts = dict(message.content["call"])
    if not facts["setup"]:
        return reply(act(NODES[facts["run"]], facts, message), message)
    try:
        setup = Setup.from_json(facts["setup"])
        place = f"{facts['run']}@{context.node_id}"
        if place not in NODES:
            NODES[place] = build_node(setup, context.node_config)
        node = NODES[place]
        if facts["nodes"]:
            take_place(node, setup, [facts["place"], facts["nodes"]])
        if setup.kept is not None:
            node.clients.prune(setup.kept)
        content = act(node, facts, message)
        node.clients.sync()
    except Exception as error:
        text = str(error) if isinstance(error, FedclError) else f"{type(error).__name__}: {error}"
        content = RecordDict({"failure": ConfigRecord({"error": text, "trace": traceback.format_exc()})})
    return reply(content, message)

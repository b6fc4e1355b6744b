"""Checks of what a strategy does: tiny runs, watched, interrupted, repeated, spread over nodes, stacked, neutral."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from ..build import build
from ..errors import RunFailed, UsageError
from ..records.checkpoint import pack_tensors, unpack_tensors
from ..records.hashing import model_sha256
from ..strategy import Strategy
from . import generators
from .declared import choices, neutral_of
from .lab import ROUNDS, Ended, Lab, Listening
from .results import Failed, NotApplicable
from .watch import Watch

CLOSE = 1e-8
"""Largest difference of two computations of the same numbers in float64, relative to an array's norm."""


@dataclass
class Observed:
    """What one watched run showed; it is run once, when a check first asks."""

    lab: Lab

    @cached_property
    def watch(self) -> Watch:
        """The watch on the strategy."""
        return Watch(self.lab.cls)

    @cached_property
    def link(self) -> Listening:
        """The way to the clients."""
        return Listening(self.lab.cls.name)

    @cached_property
    def run(self) -> Ended:
        """The run itself."""
        try:
            with generators.seeded(11):
                return self.lab.run({}, cls=self.watch.watched(), grid=self.link)
        except RunFailed as error:
            # The engine trips over a wrong state later, and in its own words.
            raise Failed("; ".join([*self.watch.states.values()][:1] or [str(error)])) from error


def check_runs(seen: Observed) -> str:
    """A stream of two tasks with three clients of unequal size is run to its end."""
    try:
        summary = seen.run.summary
    except UsageError as error:
        hint = 'if it needs other settings, declare tried_with = {"KEY": VALUE} or give the check KEY=VALUE'
        raise Failed(f"{error} ({hint})") from error
    return f"{summary['num_tasks']} tasks of {ROUNDS} rounds, {summary['num_clients']} clients of unequal size"


def check_share(seen: Observed) -> str:
    """`share` answers with one of three words for each array of the model, always the same."""
    from .. import registry

    with registry.standing_in("strategies", seen.lab.cls):
        node = build(seen.lab.config({})).node
    answers = dict(node.sharing)
    strategy = node.stack.strategies[0]
    for name in answers:
        if len({strategy.share(name, node.model) for _ in range(3)}) > 1:
            raise Failed(f"share({name!r}) does not always give the same answer; it must depend on the name only")
    trained = [name for name in node.parameters if answers[name] != "frozen"]
    if not trained:
        raise Failed("share leaves nothing to train: every parameter is frozen")
    counts = {word: sum(a == word for a in answers.values()) for word in ("shared", "private", "frozen")}
    return ", ".join(f"{count} {word}" for word, count in counts.items() if count) + " of the model's arrays"


def check_uploads(seen: Observed) -> str:
    """Every array that leaves a client has a declared reduction; what is declared but never leaves is said."""
    run, cls = seen.run, seen.lab.cls
    assert run.folder
    left = {name for names in seen.link.uploads.values() for name in names}
    prefixes = tuple(name for name in cls.reductions if name.endswith("/"))
    silent = [name for name in cls.reductions if name not in left and not any(n.startswith(name) for n in left)]
    told = {row[0].rstrip("/") for row in (cls.card.leaves_client if cls.card else ())}
    untold = sorted(n for n in left if n not in told and n.split("/")[0] not in told)
    if untold:
        raise Failed(f"{untold[0]!r} leaves a client and is not in the card's leaves_client; add a row for it")
    shown = sorted({next((p for p in prefixes if n.startswith(p)), n) for n in left})
    text = ", ".join(shown) or "nothing beside the model"
    return text + (f"; declared but never uploaded here: {', '.join(silent)}" if silent else "")


def check_state(seen: Observed) -> str:
    """What hooks return as state is a mapping of names to dense tensors, which a checkpoint gives back."""
    run = seen.run
    if seen.watch.states:
        raise Failed(next(iter(seen.watch.states.values())))
    for arrays in (run.server, *run.clients.values()):
        again = unpack_tensors(pack_tensors(arrays))
        if model_sha256(again) != model_sha256(arrays):
            raise Failed("a state is not the same after it was saved and read")
    own = f"{seen.lab.cls.name}/"
    server = sum(a.numel() * a.element_size() for n, a in run.server.items() if n.startswith("strategy/"))
    client = max((sum(a.numel() * a.element_size() for n, a in s.items() if n.startswith(own))
                  for s in run.clients.values()), default=0)  # fmt: skip
    return f"{server} bytes at the server, at most {client} at a client" if server or client else "no state"


def check_self(seen: Observed) -> str:
    """Nothing is kept on the strategy: a resumed run or another node would not have it."""
    assert seen.run
    if seen.watch.kept:
        names = ", ".join(f"self.{name}" for name in seen.watch.kept)
        raise Failed(f"{names} changes while it runs; return it as state from a hook, so that a resumed run has it")
    if seen.watch.shared:
        raise Failed(f"{', '.join(seen.watch.shared)} changes while it runs; classes are shared by all runs")
    return "only the options"


def check_inputs(seen: Observed) -> str:
    """What a hook is given to read is not written to."""
    assert seen.run
    for hook, names in seen.watch.written.items():
        what = ", ".join(sorted(names))
        raise Failed(f"{hook} writes into {what} in place; others read the same tensors: make a new one and return it")
    return "what hooks are given stays as it was"


def check_random(seen: Observed) -> str:
    """No global generator is drawn from, and none decides the result."""
    first = seen.run
    for generator, hooks in seen.watch.draws.items():
        advice = "step.uniform, step.normal or fedcl.random draw by name instead"
        raise Failed(f"{generator} is drawn from in {', '.join(sorted(hooks))}; {advice}")
    with generators.seeded(12):
        before = generators.states()
        second = seen.lab.run({})
        after = generators.states()
    moved = [n for n, a, b in zip(generators.NAMES, before, after, strict=True) if a != b]
    if moved:
        raise Failed(f"{moved[0]} is drawn from outside of the hooks, for example in a helper function or __init__")
    difference = first.differs(second)
    if difference:
        raise Failed(f"with other global seeds {difference}: something draws or keeps what no state holds")
    return "the global generators are untouched and decide nothing"


def check_repeat(seen: Observed) -> str:
    """The same settings give the same bits again."""
    difference = seen.lab.run({}).differs(seen.lab.run({}))
    if difference:
        raise Failed(f"run twice, {difference}; look for sets, time, addresses, or things kept between runs")
    return "two runs give the same hashes"


def check_resume(seen: Observed) -> str:
    """Interrupted within a task and resumed, the run ends with the same hashes."""
    for task in range(seen.run.summary["num_tasks"]):
        difference = seen.lab.interrupted(task, 1).differs(seen.run)
        if difference:
            raise Failed(
                f"interrupted in task {task + 1}, round 2, and resumed, {difference}: what a hook needs later must "
                f"be in the state it returns"
            )
    return "interrupted within each task and resumed: the same hashes"


def check_nodes(seen: Observed) -> str:
    """Clients on two nodes give the hashes of one node: all that a client needs is in what it is sent."""
    if seen.lab.cls.centralised:
        raise NotApplicable("a centralised bound has one client")
    difference = seen.lab.two_nodes().differs(seen.run)
    if difference:
        raise Failed(
            f"with the clients on two nodes {difference}: a client hook may read only what it is given (ctx, step), "
            f"never what another client or the server left in this process"
        )
    return "two nodes give the hashes of one"


def check_stacked(seen: Observed) -> str:
    """Clients that are trained as one stacked model learn what they learn one by one, in float64."""
    stacked = seen.lab.run({"engine.path": "stacked"})
    if stacked.departed:
        raise NotApplicable(f"clients are trained one by one: {stacked.departed}")
    difference = stacked.distance(seen.run, CLOSE)
    if difference:
        raise Failed(f"stacked, {difference} from training one by one")
    hint = "" if seen.lab.cls.stackable else "; stackable = True would save trying it out in every run"
    return f"the same to {CLOSE:.0e}{hint}"


def check_neutral(seen: Observed) -> str:
    """With its neutral options the strategy trains the model as plain averaging does."""
    cls = seen.lab.cls
    options = neutral_of(cls)
    prefix = f"options.{cls.name}."
    with_it = seen.lab.run({prefix + name: value for name, value in options.items()})

    class Plain(Strategy):
        """Federated averaging, with a projector where the checked strategy has one."""

        name = "plain_averaging_of_fedcl_check"
        needs_projector = cls.needs_projector

    settings = {key: value for key, value in seen.lab.settings.items() if not key.startswith(f"options.{cls.name}")}
    without = replace(seen.lab, cls=Plain, settings=settings).run({})
    text = ", ".join(f"{name}={value}" for name, value in options.items()) or "whatever its options"
    # Modules of the strategy's own are no part of the model that plain averaging has.
    model = {n: a for n, a in with_it.model.items() if not n.startswith(f"extra.{cls.name}.")}
    alone = replace(with_it, model=model, server={}, clients={})
    difference = alone.distance(replace(without, server={}, clients={}), CLOSE)
    if difference:
        raise Failed(f"with {text} {difference} from plain averaging: some term is not multiplied by its weight")
    return f"with {text} the model is that of plain averaging"


def check_choices(seen: Observed) -> str:
    """Each value of an option with a fixed set of values is run."""
    name, refused, tried = seen.lab.cls.name, [], 0
    found = choices(seen.lab.cls)
    for option, values in found.items():
        for value in values:
            key = f"options.{name}.{option}"
            try:
                seen.lab.run({key: value, "federation.rounds": 1})
                tried += 1
            except UsageError as error:
                refused.append(f"{option}={value} is refused ({error})")
            except Exception as error:
                raise Failed(f"with {key}={value}: {error}") from error
    if not found:
        raise NotApplicable("no option has a fixed set of values")
    return "; ".join([f"{tried} other values of {', '.join(found)} run", *refused])

"""What there is, one line each: for ``fedcl list``, and the search of ``fedcl show``."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from .. import registry
from ..cards import summary_of
from ..errors import UsageError
from ..settings import presets
from ..settings.validation import PROBES

KINDS = (*registry.KINDS, "encoders", "datasets", "presets", "protocols", "probes", "plots")


@dataclass(frozen=True)
class Row:
    """One line of a listing; the keys of its JSON form."""

    name: str
    aliases: list[str]
    summary: str
    family: str = ""

    def as_object(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def rows(kind: str, data_root: str | None = None) -> list[Row]:
    """The rows of one kind.

    A strategy, scenario or partition that cannot be imported has a summary that says why. The family of a
    dataset is ``available`` or ``missing``.

    Args:
        kind: one of ``KINDS``.
        data_root: where datasets are looked for, as ``data.root``.

    Raises:
        UsageError: there is no such kind.
    """
    if kind in registry.KINDS:
        return [_class_row(entry) for entry in registry.entries(kind)]
    if kind == "encoders":
        from ..models.catalog import ENCODERS, EXTERNAL

        return [Row(encoder.name, [], encoder.summary) for encoder in (*ENCODERS, *EXTERNAL)]
    if kind == "datasets":
        from ..data.catalog import available, check_root

        check_root(data_root)
        found = available(data_root)
        return [Row(d.name, list(d.aliases), d.summary, "available" if d.found else "missing") for d in found]
    if kind == "probes":
        return [Row(name, [], summary) for name, summary in PROBES.items()]
    if kind == "plots":
        from ..plots.catalog import KINDS as PLOTS

        return [Row(p.name, [], p.summary + (f" [{p.needs}]" if p.needs else "")) for p in PLOTS.values()]
    if kind in ("presets", "protocols"):
        return [Row(preset.name, [], preset.summary) for preset in presets.presets(kind=kind)]
    raise UsageError("KIND", kind, f"must be one of {', '.join(KINDS)}", KINDS)


def find_classes(name: str) -> list[type[Any]]:
    """The strategy, the scenario and the partition of a name, in this order; without any, that of an alias.

    Raises:
        UsageError: there is none, or its module fails to import.
    """
    found = [registry.load(kind, name, "NAME") for kind in registry.KINDS if name in registry.names(kind)]
    entries = [entry for kind in registry.KINDS for entry in registry.entries(kind)]
    if not found:
        found = [e.cls for e in entries if e.cls is not None and name in getattr(e.cls, "aliases", ())][:1]
    if found:
        return found
    if name in PROBES:
        allowed = f"this is a probe ({PROBES[name]}): evaluate.probes=[{name}] measures it; see docs/metrics.md"
        raise UsageError("NAME", name, allowed)
    known = [known for entry in entries for known in (entry.name, *getattr(entry.cls, "aliases", ()))]
    known += [protocol.name for protocol in presets.presets(kind="protocols")]
    broken = "".join(f"; {entry.problem}" for entry in entries if entry.cls is None)
    raise UsageError("NAME", name, f"there is no such strategy, scenario, partition or protocol{broken}", known)


def _class_row(entry: registry.Entry) -> Row:
    if entry.cls is None:
        return Row(entry.name, [], f"broken: {entry.problem}")
    aliases = list(getattr(entry.cls, "aliases", ()))
    return Row(entry.name, aliases, summary_of(entry.cls), str(getattr(entry.cls, "family", "")))

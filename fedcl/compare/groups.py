"""From runs to methods: which runs are seeds of the same thing, and what tells the methods apart."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..records.runs import METHOD, SAME_RUN, Broken, Run, within


@dataclass(frozen=True)
class Method:
    """Runs that differ by their seed alone.

    Attributes:
        label: the stack, with the settings that tell it from other methods where the stack does not.
        runs: by seed, ascending.
        settings: the settings in the label, by dotted key.
    """

    label: str
    runs: Mapping[int, Run]
    settings: Mapping[str, Any]

    @property
    def seeds(self) -> tuple[int, ...]:
        """Ascending."""
        return tuple(self.runs)


def group(runs: Sequence[Run], by: Sequence[str] = (), across: bool = False) -> tuple[list[Method], list[Broken]]:
    """The methods among some runs, sorted by label, and the runs left out because their seed is there already.

    Without ``by``, runs belong together where all settings of the method are equal (``fedcl.records.runs.METHOD``;
    options that were not given have their defaults), and with ``across`` those of the protocol too.

    Args:
        runs: any.
        by: settings or sections (dotted) that alone tell methods apart; ``name`` and ``engine.device`` may be some.
        across: the runs follow different protocols: these settings are shown as well.

    Raises:
        UsageError: no run has a key of ``by``, or runs that differ in other settings too would be one method.
    """
    known = {run: _identity(run) for run in runs}
    _check_keys(by, [key for settings in known.values() for key in settings])
    shared = METHOD if not across else (*METHOD, *sorted({key for run in runs for key in run.protocol}))
    told = tuple(by) or shared
    members: dict[str, list[Run]] = {}
    for run, settings in known.items():
        kept = {key: value for key, value in settings.items() if within(key, told)}
        members.setdefault(json.dumps(kept, sort_keys=True, default=str), []).append(run)
    left_out: list[Broken] = []
    found = []
    for group_runs in members.values():
        if by:
            _refuse_mixed(by, group_runs, known)
        single, again = _one_a_seed(group_runs)
        left_out += [Broken(run.folder, _why_again(run, single[run.seed])) for run in again]
        found.append((single, known[group_runs[0]]))
    labels = _labels([settings for _, settings in found], told, bool(by) or across)
    methods = [Method(label, single, chosen) for (single, _), (label, chosen) in zip(found, labels, strict=True)]
    return sorted(methods, key=lambda method: method.label), sorted(left_out, key=lambda run: run.folder)


def differing(settings: Iterable[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The keys whose values are not all equal, with the distinct values in order; a missing key is None.

    >>> differing([{"a": 1, "b": 2}, {"a": 1, "b": 3}, {"a": 1}])
    {'b': [2, 3, None]}
    """
    rows = list(settings)
    found: dict[str, list[Any]] = {}
    for key in dict.fromkeys(key for row in rows for key in row):
        values: list[Any] = []
        for row in rows:
            if row.get(key) not in values:
                values.append(row.get(key))
        if len(values) > 1:
            found[key] = values
    return found


def shown(value: Any) -> str:
    """A setting as a person writes it.

    >>> shown(None), shown(True), shown([1, 2]), shown(0.5), shown(200.0)
    ('null', 'true', '[1, 2]', '0.5', '200')
    """
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return f"[{', '.join(map(shown, value))}]" if isinstance(value, list | tuple) else str(value)


def _identity(run: Run) -> dict[str, Any]:
    """All settings, the stack by its own names, its options with defaults, plugins by content, init for any seed."""
    settings = {key: value for key, value in run.settings.items() if not key.startswith("options.")}
    settings["strategy"], options = _stack(run)
    settings |= options
    settings["name"], settings["seed"] = run.name, run.seed
    settings["plugins"] = [_plugin(run.folder, str(file)) for file in run.settings.get("plugins") or []]
    if settings.get("init"):
        # Each seed may start from the base session of its own seed.
        settings["init"] = str(settings["init"]).replace(f"seed-{run.seed}", "seed-N")
    return settings


def _stack(run: Run) -> tuple[list[str], dict[str, Any]]:
    from .. import registry

    names: list[str] = []
    options: dict[str, Any] = {}
    for written in run.strategy:
        given = {key: value for key, value in run.settings.items() if key.startswith(f"options.{written}.")}
        name, defaults = written, {}
        try:
            cls = registry.load("strategies", written)
        except UsageError:  # of a plugin that is not loaded: what was given is all that is known
            pass
        else:
            from ..cards import options_of

            name = cls.name
            defaults = {f"options.{name}.{row.name}": row.default for row in options_of(cls.Options)}
            for other in (name, *cls.aliases):
                own = f"options.{other}."
                given |= {key: value for key, value in run.settings.items() if key.startswith(own)}
        names.append(name)
        options |= defaults | {f"options.{name}.{key.split('.', 2)[2]}": _plain(value) for key, value in given.items()}
    return names, {key: _plain(value) for key, value in options.items()}


def _plain(value: Any) -> Any:
    """Numbers and lists so that a default and what YAML holds of it are equal."""
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _plugin(folder: Path, file: str) -> str:
    path = folder / file
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:8] if path.is_file() else "missing"
    return f"{Path(file).name}@{digest}"


def _check_keys(by: Sequence[str], known: Sequence[str]) -> None:
    names = dict.fromkeys(known)
    for key in by:
        if not any(within(name, [key]) for name in names):
            raise UsageError("--by", key, "must be a setting of these runs", names)


def _one_a_seed(runs: Sequence[Run]) -> tuple[dict[int, Run], list[Run]]:
    first: dict[int, Run] = {}
    again = []
    for run in runs:
        if first.setdefault(run.seed, run) is not run:
            again.append(run)
    return dict(sorted(first.items())), again


def _refuse_mixed(by: Sequence[str], runs: Sequence[Run], known: Mapping[Run, Mapping[str, Any]]) -> None:
    apart = [key for key in differing([known[run] for run in runs]) if not within(key, SAME_RUN)]
    if apart:
        allowed = f"puts runs into one method that differ in {', '.join(apart)}; name one of these keys too"
        raise UsageError("--by", ",".join(by), allowed)


def _why_again(run: Run, first: Run) -> str:
    if run.summary.get("model_sha256") and run.metric("model_sha256") == first.metric("model_sha256"):
        return f"is the same run as {first.folder}"
    apart = ", ".join(key for key in differing([first.settings, run.settings]) if not within(key, ("name", "output")))
    hint = f"it differs in {apart}, and --by tells methods apart by that" if apart else "with other numbers"
    return f"is seed {run.seed} of the method of {first.folder} again: {hint}"


def _labels(
    settings: Sequence[Mapping[str, Any]], told: Sequence[str], everywhere: bool
) -> list[tuple[str, dict[str, Any]]]:
    """Of each method its label and the settings in it: what differs among methods of the same stack.

    Args:
        settings: of each method.
        told: what tells methods apart.
        everywhere: show also what differs between methods of different stacks, but for the stacks' own settings.
    """
    own = [{key: value for key, value in row.items() if within(key, told)} for row in settings]
    stacks = [" + ".join(row.get("strategy", [])) for row in own]
    apart = [key for key in differing(own) if everywhere and not within(key, METHOD)]
    found = []
    for row, stack in zip(own, stacks, strict=True):
        alike = [other for other, name in zip(own, stacks, strict=True) if name == stack]
        keys = [key for key in dict.fromkeys([*differing(alike), *apart]) if key != "strategy"]
        if not stack and not keys:
            keys = list(row)
        chosen = {key: row.get(key) for key in keys}
        found.append((_text(stack, chosen), chosen))
    return found


def _text(stack: str, chosen: Mapping[str, Any]) -> str:
    if list(chosen) == ["name"]:
        return f"{stack} ({chosen['name']})" if stack else str(chosen["name"])
    last = [key.rpartition(".")[2] for key in chosen]
    # Only options go by their short names, and only where these are unique: "lr" could be anybody's.
    short = [
        name if key.startswith("options.") and last.count(name) == 1 else key
        for key, name in zip(chosen, last, strict=True)
    ]
    parts = ", ".join(f"{name}={shown(value)}" for name, value in zip(short, chosen.values(), strict=True))
    if not stack:
        return parts
    return f"{stack} ({parts})" if parts else stack

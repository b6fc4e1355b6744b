"""What lies in the folder of a run of a sweep: nothing, a run to go on with, a finished one, or another run."""

from __future__ import annotations

import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal

from ..config import Config, config_hash, load_config, to_yaml
from ..errors import FedclError, RunFailed, UsageError
from ..records.files import write_atomic, writing
from ..records.runfolder import CONFIG, MATRIX, SUMMARY, RunFolder
from ..records.runs import INSIDE, flat
from .grid import same

State = Literal["new", "resume", "done"]
ASKED = ".asked.yaml"
"""In a run's folder: its settings before the run settled what they left open."""


def state_of(folder: Path, config: Config) -> State:
    """What a run's folder holds.

    Raises:
        UsageError: a run with other settings.
    """
    if not (folder / CONFIG).is_file():
        return "new"
    asked = asked_for(folder, config)
    if config_hash(asked) != config_hash(config):
        old, new = flat(asdict(asked)), flat(asdict(config))
        apart = ("name", "output.", "engine.", "protocol", "plugins")
        keys = [key for key in new if not same(new[key], old.get(key)) and not key.startswith(apart)]
        told = ", ".join(f"{key}={old.get(key)}, not {new[key]}" for key in keys[:3]) or "the plugin has changed"
        allowed = f"holds a run with other settings ({told}); name=NEW or --out DIR starts another sweep"
        raise UsageError("output.dir", str(folder), allowed)
    return "done" if is_done(folder) else "resume"


def write_asked(folder: Path, config: Config) -> None:
    """Keeps the settings of a run that is to start as they were asked for: a run settles some of them when it starts.

    Raises:
        RunFailed: they cannot be written.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / ASKED, to_yaml(config).encode())


def asked_for(folder: Path, like: Config) -> Config:
    """The settings that a run was asked for, with the plugins that it used.

    Args:
        like: settings to compare with. Of a run that no sweep started only the settled settings are known: what these
            leave to be chosen is taken to have been left then too.
    """
    stored = load_config(folder / CONFIG)
    if (folder / ASKED).is_file():
        return replace(load_config(folder / ASKED), plugins=stored.plugins)
    given, found = flat(asdict(like)), flat(asdict(stored))
    open_ = {key: value for key, value in given.items() if value == "auto" and found.get(key) != value}
    if not like.federation.batch_min:
        open_["federation.batch_min"] = 0
    for key, value in open_.items():
        section, _, name = key.partition(".")
        if name and "." not in name and section != "options":
            stored = replace(stored, **{section: replace(getattr(stored, section), **{name: value})})
    return stored


def is_done(folder: Path) -> bool:
    """Whether a folder holds a finished run."""
    try:
        summary = RunFolder.view(folder).read_summary()
    except FedclError:
        return False
    return summary is not None and summary.get("status") == "done" and (folder / MATRIX).is_file()


def finished(root: Path, but: set[Path], like: Config) -> dict[str, Path]:
    """Finished runs below a sweep's folder by the hash of what they were asked for; see :func:`asked_for`."""
    found: dict[str, Path] = {}
    for path in sorted(root.rglob(SUMMARY)):
        folder = path.parent
        hidden = any(part in INSIDE or part.startswith(".") for part in folder.relative_to(root).parts)
        if hidden or folder in but or not (folder / CONFIG).is_file() or not is_done(folder):
            continue
        try:
            found.setdefault(config_hash(asked_for(folder, like)), folder)
        except FedclError:
            continue
    return found


def clear_unstarted(folder: Path) -> None:
    """Removes what a run left that was killed before it wrote its ``config.yaml``: copies of plugins.

    Raises:
        RunFailed: they cannot be removed.
    """
    if (folder / CONFIG).exists() or not folder.is_dir():
        return
    if {entry.name for entry in folder.iterdir() if not entry.name.startswith(".")} == {"plugins"}:
        try:
            shutil.rmtree(folder / "plugins")
        except OSError as error:
            raise RunFailed(f"cannot clear {folder}: {error.strerror}") from error

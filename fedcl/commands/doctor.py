"""What this machine has and lacks: for ``fedcl doctor``."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

from .. import registry
from ..data.catalog import available, data_root
from ..records.environment import usable_cpus, versions
from ..settings.values import one_line

# Distribution name -> what it is for; all others that ``versions`` names are required.
EXTRAS = {"ray": "--runtime ray", "timm": "encoders of timm"}


def examine(root: str | None, out: Path) -> dict[str, Any]:
    """Looks at versions, device, threads, data, plugins and the output folder; changes nothing.

    Args:
        root: as ``data.root``.
        out: where runs would be written.

    Returns:
        A JSON object; ``ok`` is false and ``problems`` is not empty when something required is broken.
        What is optional and missing is in ``missing``.
    """
    found = versions()
    problems = [f"{name} is not installed" for name in found if not found[name] and name not in EXTRAS]
    if not (3, 11) <= sys.version_info[:2] <= (3, 12):
        problems.append(f"Python {sys.version.split()[0]}: 3.11 or 3.12 is needed")
    device, broken_torch = _device()
    problems += broken_torch
    writable = _writable(out)
    if not writable:
        problems.append(f"{out} cannot be written; name another folder with --out")
    broken = [e for kind in registry.KINDS for e in registry.entries(kind) if e.cls is None]
    # A stranger's broken package must not make a working installation look broken.
    problems += [entry.problem for entry in broken if entry.origin == "fedcl-sim"]
    place = data_root(root)
    data = [d for d in available(root) if d.where]
    missing = [f"{name} (for {use})" for name, use in EXTRAS.items() if found.get(name) is None]
    if not place.is_dir():
        missing.append(f"the data folder {place} (set --data-root or FEDCL_DATA_ROOT)")
    return {
        "ok": not problems,
        "problems": problems,
        "python": sys.version.split()[0],
        "versions": found,
        "device": device,
        "cpus": os.cpu_count(),
        "threads": usable_cpus(),
        "data_root": str(place),
        "data": {d.name: d.where for d in data},
        "output": {
            "dir": str(out),
            "writable": writable,
            "free_bytes": shutil.disk_usage(_existing(out)).free,
        },
        "broken_plugins": [entry.problem for entry in broken],
        "missing": missing,
    }


def describe(report: dict[str, Any]) -> str:
    """A report of :func:`examine` as lines."""
    rows = [("python", report["python"])]
    rows += [(name, version or "not installed") for name, version in report["versions"].items()]
    gpus = ", ".join(report["device"]["gpus"]) or "no GPU"
    rows.append(("device", f"{report['device']['default']} ({gpus})"))
    rows.append(("threads", f"{report['threads']} of {report['cpus']} processors"))
    rows.append(("data root", report["data_root"]))
    rows += [(f"  {name}", where) for name, where in report["data"].items()]
    free = f"{report['output']['free_bytes'] / 2**30:.1f} GiB free"
    rows.append(("output", f"{report['output']['dir']} ({free})"))
    rows += [("missing", text) for text in report["missing"]]
    rows += [("broken plugin", text) for text in report["broken_plugins"]]
    rows += [("problem", text) for text in report["problems"]]
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {text}" for name, text in rows]
    return "\n".join([*lines, "all that is required works" if report["ok"] else "something required is broken"])


def _device() -> tuple[dict[str, Any], list[str]]:
    try:
        import torch

        gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    except (ImportError, OSError, RuntimeError) as error:
        return {"default": None, "gpus": []}, [f"torch does not work: {one_line(error)}"]
    return {"default": "cuda" if torch.cuda.is_available() else "cpu", "gpus": gpus}, []


def _existing(path: Path) -> Path:
    path = path.expanduser().absolute()
    return next(place for place in (path, *path.parents) if place.exists())


def _writable(path: Path) -> bool:
    place = _existing(path)
    return place.is_dir() and os.access(place, os.W_OK | os.X_OK)

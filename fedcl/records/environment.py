"""What a run was computed with, for ``environment.json``; nothing about whose machine it was."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import fedcl

_PACKAGES = (
    "torch",
    "torchvision",
    "flwr",
    "avalanche-lib",
    "numpy",
    "omegaconf",
    "matplotlib",
    "safetensors",
    "scikit-learn",
    "rich",
    "typer",
    "ray",
    "timm",
)

SHARE = "FEDCL_CPUS"
"""Environment variable that a sweep sets for its workers, which share the machine."""


def versions() -> dict[str, str | None]:
    """Versions of fedcl and what it stands on, None for what is not installed; imports none of them."""
    found: dict[str, str | None] = {"fedcl": fedcl.__version__}
    found.update({name: _version(name) for name in _PACKAGES})
    return found


def environment() -> dict[str, Any]:
    """Everything about this process that may change the bits of a result; plain JSON values.

    Call it after the number of threads was set. No host name, user name or path is in it.
    """
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "source_revision": source_revision(),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "versions": versions(),
        "cpu": cpu_model(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpus": os.cpu_count(),
        "cpus_usable": usable_cpus(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
        "cuda": torch.version.cuda if gpus else None,
        "cudnn": torch.backends.cudnn.version() if gpus else None,  # type: ignore[no-untyped-call]  # torch's own
    }


def usable_cpus() -> int:
    """How many logical processors this process may run on, or count as its share of them: ``FEDCL_CPUS``."""
    here = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    share = os.environ.get(SHARE, "")
    return min(here, int(share)) if share.isdigit() and int(share) else here


def cpu_model() -> str:
    """The processor's name as the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def source_revision(folder: Path = Path(__file__).parents[1]) -> str | None:
    """``git describe`` of the checkout that ``folder`` is tracked in; None if there is none, or no git.

    A package that is merely installed somewhere inside another project's checkout is not tracked there.
    """
    # A hook's GIT_DIR would point elsewhere, and describe would rewrite the index of what it only reads.
    clean = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    clean["GIT_OPTIONAL_LOCKS"] = "0"

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(folder), *arguments], env=clean, capture_output=True, text=True, timeout=10
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if not git("ls-files", "."):
        return None
    return git("describe", "--always", "--dirty", "--tags", "--abbrev=12") or None


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None

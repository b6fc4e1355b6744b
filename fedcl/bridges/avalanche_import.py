"""Importing and calling Avalanche without its side effects."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import os
import random
import sys
import tempfile
import warnings
from collections.abc import Iterator

import numpy as np
import torch

_log = logging.getLogger("fedcl.avalanche")


@contextlib.contextmanager
def sealed(seed: int | None = None) -> Iterator[None]:
    """Runs foreign code so that it leaves nothing behind.

    The global generators of Python, NumPy and torch, the environment variables and the warning filters are as
    before afterwards; what is printed goes line by line to the logger ``fedcl.avalanche``.

    Args:
        seed: seeds the three generators inside, for code that draws from them; None leaves them.
    """
    python, torch_state = random.getstate(), torch.get_rng_state()
    numpy_state = np.random.get_state()  # noqa: NPY002
    environment = dict(os.environ)
    text = io.StringIO()
    try:
        if seed is not None:
            random.seed(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002
            torch.default_generator.manual_seed(seed)
        with (
            contextlib.redirect_stdout(text),
            contextlib.redirect_stderr(text),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy_state)  # noqa: NPY002
        torch.set_rng_state(torch_state)
        _restore_environment(environment)
        for line in text.getvalue().splitlines():
            if line.strip():
                _log.info("%s", line.rstrip())


def quiet_avalanche() -> None:
    """Imports Avalanche (seconds, once): no file in the home folder, no output, global state untouched.

    Avalanche writes ``~/.avalanche/config.json`` when it is imported and finds none; then the file goes to a
    temporary folder that is removed again, and its data folder stays the usual one. A user's own file is
    read as ever. One of its dependencies draws from NumPy's global generator, others set environment
    variables.
    """
    if "avalanche" in sys.modules:
        return
    home = os.path.expanduser("~/.avalanche")
    with sealed(), contextlib.ExitStack() as stack:
        own = os.path.exists(os.path.join(home, "config.json"))
        if not own:
            elsewhere = stack.enter_context(tempfile.TemporaryDirectory(prefix="fedcl-avalanche-"))
            stack.enter_context(_moved_home("~/.avalanche", elsewhere))
        importlib.import_module("avalanche.benchmarks")
        if not own:
            utilities = importlib.import_module("avalanche.benchmarks.datasets.dataset_utils")
            utilities.set_dataset_root(os.path.join(home, "data"))


@contextlib.contextmanager
def _moved_home(prefix: str, folder: str) -> Iterator[None]:
    """Lets ``os.path.expanduser`` answer ``folder`` for paths below ``prefix``; HOME itself stays for all
    others.
    """
    usual = os.path.expanduser

    def expanduser(path: str) -> str:
        return folder + path[len(prefix) :] if str(path).startswith(prefix) else usual(path)

    os.path.expanduser = expanduser  # type: ignore[assignment]
    try:
        yield
    finally:
        os.path.expanduser = usual


def _restore_environment(before: dict[str, str]) -> None:
    for name in set(os.environ) - set(before):
        del os.environ[name]
    for name, value in before.items():
        if os.environ.get(name) != value:
            os.environ[name] = value

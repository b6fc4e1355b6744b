"""Runs experiments in processes of their own that die, or fail, at an exact point.

Started as a script it imports everything slow once, reads one JSON request a line, forks, and answers with how the
child ended. A request has ``settings`` (a new run) or ``folder`` (resume), and ``faults``: at the ``at``-th call
(from 1) of one of ``functions`` (whose arguments mention ``match``), ``action`` is done ``before`` or ``after`` it.
"""

from __future__ import annotations

import errno
import importlib
import json
import os
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

EVERYTHING = [
    "fedcl.local.training:gather", "fedcl.records.files:write_bytes", "fedcl.records.files:replace",
    "fedcl.records.files:sync", "fedcl.federation.server:merge_measured", "fedcl.measure.evaluation:Evaluator.predict",
]  # fmt: skip
"""Steps, everything that touches the disk for whole files, replies, evaluations."""


class Children:
    """The parent's end."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__))], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def start(self, request: dict[str, Any]) -> dict[str, Any]:
        """Runs one child to its end: ``signal`` (or 0), ``code``, ``error`` (text), ``messages``, ``calls``."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer

    def close(self) -> None:
        """Ends the process that forks."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)
        self.process.stdout.close()


class Fault:
    """Wraps functions so that something happens at one call."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self.spec = spec
        self.calls = 0
        for name in spec["functions"]:
            module, attribute = name.split(":")
            owner: Any = importlib.import_module(module)
            *parents, last = attribute.split(".")
            for parent in parents:
                owner = getattr(owner, parent)
            setattr(owner, last, self.wrapped(getattr(owner, last)))

    def wrapped(self, function: Any) -> Any:
        """The function with the fault in front of it or behind it."""

        def call(*args: Any, **kwargs: Any) -> Any:
            if not any(self.spec.get("match", "") in str(a) for a in args):
                return function(*args, **kwargs)
            self.calls += 1
            due = self.calls == self.spec["at"] or (self.spec.get("ever_after") and self.calls > self.spec["at"])
            if due and self.spec.get("when", "before") == "before":
                self.act(args)
            result = function(*args, **kwargs)
            if due and self.spec.get("when") == "after":
                self.act(args)
            return result

        return call

    def act(self, args: tuple[Any, ...]) -> None:
        """What happens."""
        action = self.spec["action"]
        if action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif action == "tear":  # half of a file, then death
            path, data = args
            path.write_bytes(data[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        elif action == "full":
            raise OSError(errno.ENOSPC, "No space left on device")
        elif action.startswith("interrupt"):
            for _ in range(int(action.removeprefix("interrupt"))):
                os.kill(os.getpid(), signal.SIGINT)


def child(request: dict[str, Any], told: int) -> int:
    """Runs or resumes; returns the exit code."""
    from fedcl.config import load_config
    from fedcl.errors import FedclError
    from fedcl.run import execute, resume
    from fedcl.tell.progress import QuietProgress

    messages: list[str] = []

    class Listening(QuietProgress):
        def message(self, text: str) -> None:
            messages.append(text)

    faults = [Fault(spec) for spec in request.get("faults", [])]
    code, error = 0, ""
    try:
        if "folder" in request:
            resume(Path(request["folder"]), progress=Listening())
        else:
            execute(load_config({"strategy": ["finetune"]}, request["settings"]), progress=Listening())
    except FedclError as caught:
        code, error = caught.exit_code, str(caught)
    except BaseException:
        code, error = 99, traceback.format_exc()
    note = {"code": code, "error": error, "messages": messages, "calls": [f.calls for f in faults]}
    os.write(told, json.dumps(note).encode())
    return code


def main() -> None:
    """The loop of the process that forks."""
    import fedcl.build
    from fedcl.config import load_config

    fedcl.build.build(load_config({"strategy": ["finetune"]}, {"engine.threads": 1}))  # imports all; trains nothing
    for name in (
        "fedcl.run",
        "fedcl.measure.evaluation",
        "fedcl.federation.server",
        "fedcl.federation.flower_internals",
    ):
        importlib.import_module(name)
    for line in sys.stdin:
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reader)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os._exit(child(json.loads(line), writer))
        os.close(writer)
        _, status = os.waitpid(pid, 0)
        with os.fdopen(reader) as stream:
            text = stream.read()
        died = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        print(json.dumps({"signal": died, **(json.loads(text) if text else {})}), flush=True)


if __name__ == "__main__":
    main()

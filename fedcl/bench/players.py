"""The parent's side of a benchmark: contestants as processes that get one turn after the other."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .turns import GO

START_LIMIT = 600.0  # seconds to load everything
TURN_LIMIT = 3600.0  # seconds a round may take
FINISH_LIMIT = 600.0  # seconds for what comes after the last round
FAREWELL = 30.0  # seconds to leave after that
# fedcl lets waiting threads sleep earlier than GNU OpenMP does; peers keep the library's own number.
THEIRS = {"GOMP_SPINCOUNT": "300000"}
Say = Callable[[str], None]


class PlayerFailed(Exception):
    """A contestant died, or did not answer in time; the message is its last line of error."""


class Player:
    """One contestant's process.

    Args:
        name: in messages.
        command: what to run.
        log: file for everything that the process prints.

    Attributes:
        seconds: of every turn so far.
        facts: what the contestant said of itself.
        peak: the largest memory its processes held, in MB: of each its resident peak, summed; None where unknown.
        failure: why it takes no more turns, one line; None while all is well.
    """

    def __init__(self, name: str, command: Sequence[str], log: Path) -> None:
        environment = os.environ if name == "fedcl" else os.environ | THEIRS
        self.name, self.log = name, log
        self.seconds: list[float] = []
        self.facts: dict[str, Any] = {}
        self.peak: float | None = None
        self.failure: str | None = None
        self._finished = False
        with log.open("w") as errors:
            # A group of its own, so that Ctrl-C reaches only the parent, which then ends every process of the group.
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
                start_new_session=True, env=environment,
            )  # fmt: skip
        self._answers: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def wait_ready(self) -> None:
        """Returns when the contestant has loaded everything.

        Raises:
            PlayerFailed: see there.
        """
        self.facts |= self._answer("ready", START_LIMIT)

    def turn(self) -> float:
        """Lets the contestant do one round; returns its seconds.

        Raises:
            PlayerFailed: see there.
        """
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the answer, or its absence, says more
            self._process.stdin.write(GO + "\n")
            self._process.stdin.flush()
        seconds = float(self._answer("seconds", TURN_LIMIT))
        self.seconds.append(seconds)
        now = peak_memory(self._process.pid)
        if now is not None:
            self.peak = max(now, self.peak or 0.0)
        return seconds

    def finish(self) -> None:
        """Returns when the contestant has ended well after its last turn.

        Raises:
            PlayerFailed: see there.
        """
        self.facts |= self._answer("finished", FINISH_LIMIT)
        self._finished = True

    def close(self) -> None:
        """Ends the process and all that it started; may be called at any time, and twice."""
        assert self._process.stdin is not None
        if self._process.poll() is not None:
            return
        family = descendants(self._process.pid)
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        # One that has finished takes its own processes down with it, which may take a while.
        for step, patience in (
            (None, FAREWELL if self._finished else 1.0),
            (signal.SIGTERM, 5.0),
            (signal.SIGKILL, None),
        ):
            if step is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._process.pid, step)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(patience)
                break
        if not self._finished:
            for process in family[1:]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)

    def _answer(self, kind: str, limit: float) -> Any:
        try:
            line = self._answers.get(timeout=limit)
        except queue.Empty:
            raise PlayerFailed(f"no answer within {limit:g} s") from None
        if not line:
            self._process.wait()
            raise PlayerFailed(last_error(self.log.read_text(errors="replace"), self._process.returncode))
        message = json.loads(line)
        if kind not in message:
            raise PlayerFailed(f"answered {line.strip()!r} where {kind!r} was due")
        return message[kind]

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put("")


def last_error(log: str, code: int) -> str:
    """The line of a log that says why a process ended: the last that names an exception, else the last.

    >>> last_error("Traceback ...\\nValueError: no such thing\\n(pid 7) bye\\n", 1)
    'ValueError: no such thing'
    >>> last_error("", -9)
    'ended with code -9 and no message'
    """
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Failed|Killed)\b", line)]
    return (named or lines or [f"ended with code {code} and no message"])[-1][:300]


def peak_memory(pid: int) -> float | None:
    """Peak resident memory of a process and its descendants, summed, in MB (10^6 bytes); None where it is not told.

    Pages that several processes share are counted once for each.
    """
    if sys.platform != "linux":
        return None
    total = 0
    for process in descendants(pid):
        with contextlib.suppress(OSError):
            status = Path(f"/proc/{process}/status").read_text()
            found = re.search(r"VmHWM:\s+(\d+) kB", status)
            total += int(found[1]) * 1024 if found else 0
    return total / 1e6 if total else None


def descendants(pid: int) -> list[int]:
    """A process and, on Linux, all that descend from it."""
    found = [pid]
    for parent in found:
        for file in Path(f"/proc/{parent}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                found += [int(child) for child in file.read_text().split()]
    return found


def play(commands: Mapping[str, Sequence[str]], rounds: int, folder: Path, say: Say) -> list[Player]:
    """Gives every contestant its warm-up and then ``rounds`` turns in rotation, and lets all of them end.

    Each warms up by itself right after it has started. In round r the turns begin with contestant r mod their number,
    so that none always comes after the same other. One that fails takes no more turns, and ``failure`` says why.

    Args:
        commands: what to run, by name.
        rounds: turns of each after its first.
        folder: for the logs, one a contestant.
        say: is told how it goes, in lines.

    Returns:
        The players, all of them ended, in the order of ``commands``.
    """
    players: list[Player] = []
    try:
        for name, command in commands.items():
            player = Player(name, command, folder / f"{name}.log")
            players.append(player)
            _attempt(player, player.wait_ready, say)
            _attempt(player, player.turn, say)
            if player.failure is None:
                say(f"{name}: first round {player.seconds[0]:.3g} s")
        for index in range(rounds):
            shift = index % max(len(players), 1)
            for player in [*players[shift:], *players[:shift]]:
                _attempt(player, player.turn, say)
            told = ", ".join(f"{p.name} {p.seconds[-1]:.3g} s" for p in players if p.failure is None)
            say(f"round {index + 1}/{rounds}: {told}")
        for player in players:
            _attempt(player, player.finish, say)
    finally:
        for player in players:
            player.close()
    return players


def _attempt(player: Player, what: Callable[[], object], say: Say) -> None:
    if player.failure is not None:
        return
    try:
        what()
    except PlayerFailed as error:
        player.failure = str(error)
        say(f"{player.name} failed: {error}")
        player.close()

"""What a sweep tells while it goes: lines without a terminal, one table on one."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fedcl.config import Config
from fedcl.sweep.board import HEARTBEAT, Board, LineBoard, LiveBoard, make_board
from fedcl.sweep.job import Outcome
from fedcl.sweep.plan import Point


class Time:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


POINTS = [Point(name, {}, Config(seed=seed), Path(), "new") for name in ("a", "b") for seed in (0, 1)]
AT = {"task": 1, "tasks": 4, "round": 2, "rounds": 4, "accuracy": 0.5, "forgetting": None}


def play(board: Board, clock: Time) -> None:
    board.begin("s: 4 runs", POINTS)
    board.started(0)
    board.started(1)
    clock.now = 30.0
    board.ended(0, Outcome("done"))
    board.at(1, AT)
    clock.now = 31.0 + HEARTBEAT
    board.at(1, AT)
    board.ended(1, Outcome("failed", "it broke"))


def test_lines() -> None:
    clock, stream = Time(), io.StringIO()
    play(LineBoard(stream, lambda point: (0.75, 0.1), clock), clock)
    assert stream.getvalue().splitlines() == [
        "s: 4 runs",
        "1/4 a seed 0: accuracy 75.0 %, forgetting 10.0 %, 30 s, ETA 1 min 30 s",
        "running: a seed 1 at task 2/4 round 2/4; ETA 2 min 54 s",
        "2/4 a seed 1: FAILED: it broke",
    ]


def test_one_table_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    clock, stream = Time(), Terminal()
    board = make_board(False, stream, lambda point: (0.75, 0.1))
    assert isinstance(board, LiveBoard)
    board._clock = clock
    try:
        play(board, clock)
    finally:
        board.close()
    drawn = io.StringIO()
    Console(file=drawn, width=100).print(board.draw())
    lines = [line.split() for line in drawn.getvalue().splitlines() if line.strip()]
    assert lines[0] == ["variant", "done", "accuracy", "forgetting", "now"]
    assert lines[2] == ["a", "1/2", "75.0", "%", "10.0", "%", "seed", "1", "failed"]
    assert lines[3] == ["b", "0/2", "-", "-"]
    assert " ".join(lines[4]).startswith("1/4 done, 0 running, 1 failed, ETA")
    assert "a seed 1: FAILED: it broke" in stream.getvalue()


def test_quiet_says_nothing(capsys: pytest.CaptureFixture[Any]) -> None:
    clock = Time()
    play(make_board(True, io.StringIO(), lambda point: (None, None)), clock)
    assert capsys.readouterr() == ("", "")

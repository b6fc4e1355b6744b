from __future__ import annotations

import io
import re

import pytest

from fedcl.tell.progress import (
    PlainProgress,
    Progress,
    QuietProgress,
    RichProgress,
    Standing,
    duration,
    make_progress,
    percent,
    size,
)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def play(progress: Progress, clock: Clock, tasks: int, rounds: int, seconds: float, done: int = 0) -> None:
    progress.start("title [a,b]", tasks, rounds, done)
    for number in range(done, tasks * rounds):
        clock.now += seconds
        task, round = divmod(number, rounds)
        progress.round(task, round, Standing(0.5, None, 1_500_000))
        if round == rounds - 1:
            progress.task_done(task, Standing(0.831, 0.042, 2_000_000_000))
    progress.message("[red]not markup[/red]")
    progress.finish()
    progress.finish()


def test_plain_story() -> None:
    stream, clock = io.StringIO(), Clock()
    play(PlainProgress(stream, clock), clock, tasks=2, rounds=2, seconds=50.0)
    assert stream.getvalue().splitlines() == [
        "title [a,b]: 2 tasks of 2 rounds",
        "task 1/2 round 1/2: accuracy 50.0 %, forgetting -, sent 1.5 MB, ETA 2 min 30 s",
        "task 1/2 round 2/2: accuracy 50.0 %, forgetting -, sent 1.5 MB, ETA 1 min 40 s",
        "task 1/2 done: accuracy 83.1 %, forgetting 4.2 %, sent 2.0 GB",
        "task 2/2 round 1/2: accuracy 50.0 %, forgetting -, sent 1.5 MB, ETA 50 s",
        "task 2/2 round 2/2: accuracy 50.0 %, forgetting -, sent 1.5 MB, ETA 0 s",
        "task 2/2 done: accuracy 83.1 %, forgetting 4.2 %, sent 2.0 GB",
        "[red]not markup[/red]",
    ]


def test_time_left_after_a_resume_counts_only_new_rounds() -> None:
    stream, clock = io.StringIO(), Clock()
    play(PlainProgress(stream, clock), clock, tasks=1, rounds=100, seconds=2.0, done=90)
    lines = stream.getvalue().splitlines()
    assert lines[0].endswith("going on after round 90 of 100")
    assert lines[1].endswith("ETA 18 s")


@pytest.mark.parametrize(("rounds", "seconds", "lines"), [(200, 1.0, 200), (1000, 1.0, 50), (1000, 30.0, 500)])
def test_long_runs_say_less(rounds: int, seconds: float, lines: int) -> None:
    stream, clock = io.StringIO(), Clock()
    play(PlainProgress(stream, clock), clock, 1, rounds, seconds)
    assert len(re.findall("ETA", stream.getvalue())) == lines


@pytest.mark.parametrize("width", [80, 120])
def test_live_line_fits_and_scrolls_tasks(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm")
    stream, clock = Terminal(), Clock()
    progress = RichProgress(stream, clock)
    progress.start("title [a,b]", 10, 10, 0)
    clock.now += 100
    progress.round(0, 9, Standing(0.5, 0.1, 12_300_000))
    progress.task_done(0, Standing(0.831, 0.042, 2_000_000_000))
    progress.message("[red]not markup[/red]")
    progress.finish()
    progress.finish()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    assert "title [a,b]" in text
    assert "[red]not markup[/red]" in text
    assert "task 1/10: accuracy 83.1 %, forgetting 4.2 %, sent 2.0 GB" in text
    assert "task 1/10 round 10/10" in text
    assert "ETA 15 min 00 s | acc 50.0 % | forget 10.0 % | 12.3 MB" in text
    assert max(map(len, re.split(r"[\r\n]", text))) <= width
    assert stream.getvalue().rindex("\x1b[?25h") > stream.getvalue().rindex("\x1b[?25l")


def test_the_right_one_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    assert isinstance(make_progress(False, Terminal()), RichProgress)
    assert isinstance(make_progress(False, io.StringIO()), PlainProgress)
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(make_progress(False, Terminal()), PlainProgress)
    stream, clock = Terminal(), Clock()
    quiet = make_progress(True, stream)
    assert isinstance(quiet, QuietProgress)
    play(quiet, clock, 1, 1, 1.0)
    assert stream.getvalue() == ""


def test_numbers_for_people() -> None:
    assert [size(n) for n in (0, 1000, 10**15, 5 * 10**15)] == ["0 B", "1.0 kB", "1.0 PB", "5.0 PB"]
    assert [duration(s) for s in (0, 59.6, 3599.7)] == ["0 s", "1 min 00 s", "1 h 00 min"]
    assert [percent(x) for x in (0.0, 1.0, -0.05)] == ["0.0 %", "100.0 %", "-5.0 %"]

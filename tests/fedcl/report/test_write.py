"""What a report says, where it goes, how large it is."""

from __future__ import annotations

import base64
import re
import shlex
import shutil
from pathlib import Path
from types import ModuleType

import pytest

from fedcl.commands.cli import run_command_line
from fedcl.errors import RunFailed, UsageError
from fedcl.records.runs import as_run
from fedcl.report import layout, write_report
from fedcl.report.amounts import all_numbers, key_figures
from fedcl.report.figures import inline_svg
from fedcl.report.parts import number, percent
from fedcl.report.settings import sections_of
from fedcl.report.single import run_page

PAGE = Path(__file__).parents[3] / "docs" / "report.md"


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def test_a_run_of_its_own(real: Path, single: Path) -> None:
    assert single == real / "report.html"
    text = text_of(single)
    for kind in (
        "accuracy",
        "matrix",
        "forgetting",
        "clients",
        "split",
        "bytes",
        "features",
        "drift",
        "probes",
        "costs",
    ):
        assert f'id="figure-{kind}"' in text
    assert "undefined" in text
    assert "Forward transfer" in text


def test_nothing_outside_is_named(single: Path, comparison: Path) -> None:
    for path in (single, comparison):
        text = text_of(path)
        assert set(re.findall(r"https?://[^\s\"'<]*", text)) <= {"http://www.w3.org/2000/svg"}
        assert not re.search(r"""(?:src|href)=["'](?!data:|#)""", text)
        assert "@import" not in text


def test_the_same_bytes_again(real: Path, single: Path, many: Path, comparison: Path, tmp_path: Path) -> None:
    for folder, path in ((real, single), (many, comparison)):
        again = write_report([folder], tmp_path / f"{folder.name}.html").path
        assert again.read_bytes() == path.read_bytes()


def test_a_huge_run_stays_small(huge: Path) -> None:
    written = write_report([huge])
    assert written.size < 5_000_000
    text = text_of(written.path)
    assert "The first 1\u202f000 of 1\u202f200 rows; all are in events.jsonl." in text
    assert text.count("<option") == 200


def test_what_does_not_fit_is_cut(huge: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = run_page(as_run(huge), ())
    whole = len(layout.render(page).encode())
    monkeypatch.setattr(layout, "MOST_BYTES", whole - 1)
    monkeypatch.setattr(layout, "LEVELS", [layout.Limits(rows, 1_000_000) for rows in (1000, 60)])
    text = layout.render(page)
    assert "The first 60 of 1\u202f200 rows; all are in events.jsonl." in text
    assert "The first 60 of 100 classes; all are in class_accuracy.csv." in text
    assert text.count("<option") == 120
    assert len(text.encode()) < whole
    monkeypatch.setattr("fedcl.report.command.MOST_BYTES", 10_000)
    with pytest.raises(RunFailed, match="report fewer runs at once"):
        write_report([huge], tmp_path / "none.html")
    assert not (tmp_path / "none.html").exists()


def test_large_pictures_become_png(many: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = run_page(as_run(many / "plain" / "seed-0"), ())
    monkeypatch.setattr(type(page.pictures[0]), "png", lambda self: f"data:image/png;base64,{self.kind}")
    monkeypatch.setattr(layout, "LEVELS", [layout.Limits(10, 0)])
    text = layout.render(page)
    assert text.count('<img alt="" src="data:image/png;base64,') == len(page.pictures) > 3
    monkeypatch.undo()
    assert base64.b64decode(page.pictures[0].png().partition(",")[2]).startswith(b"\x89PNG")


def test_a_comparison(many: Path, comparison: Path) -> None:
    assert comparison == many / "report.html"
    text = text_of(comparison)
    assert re.search(r"replay[^<]* is ahead of finetune by \d+\.\d points \(95 % interval [^<]*Holm p = 0\.016\)", text)
    assert "seed-9" in text
    assert "there is no" in text or "is not finished" in text


def test_folders_that_are_not_whole_are_named(many: Path, tmp_path: Path) -> None:
    written = write_report([many], tmp_path / "x.html")
    assert len(written.notes) == 1
    assert written.notes[0].startswith("left out: ")
    assert "seed-9" in written.notes[0]
    with pytest.raises(RunFailed, match=r"no run is finished; left out: .*seed-9"):
        write_report([many / "plain" / "seed-9"])


def test_one_whole_run_among_broken_ones(many: Path, tmp_path: Path) -> None:
    for seed in (0, 9):
        shutil.copytree(many / "plain" / f"seed-{seed}", tmp_path / f"seed-{seed}")
    written = write_report([tmp_path])
    assert written.path == tmp_path / "seed-0" / "report.html"
    assert "seed-9" in text_of(written.path)


def test_other_protocols_are_refused_by_name(tmp_path: Path, made_runs: ModuleType) -> None:
    for name, rounds in (("a", 5), ("b", 6)):
        made_runs.make_run(tmp_path, name, 0, 0.5, {"federation.rounds": rounds}, {})
    with pytest.raises(UsageError, match=r"different protocols: federation\.rounds .*--across-protocols"):
        write_report([tmp_path])
    written = write_report([tmp_path / "a", tmp_path / "b"], across_protocols=True)
    assert written.path.resolve() == tmp_path / "report.html"
    assert "follow different protocols: federation.rounds (5 | 6)" in text_of(written.path)


def test_the_command(many: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "page.html"
    assert run_command_line(["report", str(many / "plain" / "seed-0"), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert out.is_file()
    assert str(out) in said
    assert out.as_uri() in said
    assert run_command_line(["report", str(many), "--out", "page.txt"]) == 2
    assert "must end in .html" in capsys.readouterr().err


def test_settings_that_differ_are_marked(real: Path) -> None:
    sections = {section.name: section for section in sections_of(as_run(real))}
    rows = {row.key: row for section in sections.values() for row in section.settings}
    assert rows["partition.alpha"].changed
    assert (rows["partition.alpha"].value, rows["partition.alpha"].default) == ("1", "0.5")
    assert not rows["data.name"].changed
    assert not rows["options.replay.budget"].changed
    assert sections["partition"].changed == sum(row.changed for row in sections["partition"].settings) > 1
    assert not sections["labels"].changed


def test_numbers_have_their_units_and_undefined_ones_a_name(real: Path) -> None:
    figures = {figure.name: figure for figure in key_figures(as_run(real))}
    assert re.fullmatch(r"\d+\.\d %", figures["Average accuracy"].value)
    assert re.fullmatch(r"[\d.]+ kB", figures["Sent by clients"].value)
    assert figures["Forward transfer"].value == "–"
    rows = {row[0].text: row[1] for row in all_numbers(as_run(real)).rows}
    assert (rows["forward_transfer"].text, rows["forward_transfer"].value) == ("undefined", None)
    assert rows["num_tasks"].text == "3"


def test_undefined_numbers_are_no_zeros() -> None:
    assert (percent(None).text, percent(None).value) == ("–", None)
    assert (number(float("nan")).text, number(float("nan")).value) == ("–", None)
    assert number(-0.01, 1).text == "0.0"


def test_pictures_do_not_reach_beyond_themselves(single: Path) -> None:
    drawn = b"""<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="9pt">
    <defs><style>* {stroke: red}</style><path id="a" d="M 0 0\nL 1 1"/></defs><g id="b"><use xlink:href="#a"/></g>
    <text id="c" style="font-size: 8px; font-family: 'X', serif; fill: #fff">id="a" &lt;b&gt;</text></svg>"""
    found = inline_svg(drawn, "plot")
    assert "<style" not in found
    assert 'href="#plot-a"' in found
    assert 'id="plot-a"' in found
    assert 'id="b"' not in found
    assert "font-family" not in found
    assert 'id="a" &lt;b&gt;</text>' in found
    assert "<style" not in text_of(single).partition("</head>")[2]


def test_the_commands_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```sh\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.S)
    small = ["data.limit=12", "scenario.tasks=2", "federation.rounds=1", "engine.threads=1", "output.plots=false"]
    for line in block.splitlines():
        arguments = shlex.split(line)[1:]
        assert run_command_line([*arguments, *(small if arguments[0] == "run" else [])]) == 0, line
    assert "is ahead of" in text_of(Path("runs/report.html")) or "at the one matched seed" in text_of(
        Path("runs/report.html")
    )
    assert Path("runs/plain/seed-0/report.html").is_file()

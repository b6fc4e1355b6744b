"""Every form of a comparison, with names that each form must escape, and the command end to end."""

import csv
import io
import json
import re

import pytest

from fedcl.commands.cli import run_command_line
from fedcl.compare import compare
from fedcl.compare.render import COLUMNS, FORMATS, as_csv, latex, markdown, terminal
from fedcl.errors import UsageError

ODD = ["a_b|c", "50% & $x$ #1", '*~^{}<>"', "[ünï] Größe α→β", "[bold]no markup[/bold]", '-5 = x, "q"']
METRICS = ["average_accuracy", "forgetting", "bytes_up"]


@pytest.fixture
def odd(tmp_path, made_runs):
    """Methods of odd names, three seeds each, told apart by name."""
    for place, name in enumerate(ODD):
        for seed in range(3):
            accuracy = 0.5 + 0.02 * place + 0.003 * ((seed * (place + 3)) % 5)
            made_runs.make_run(tmp_path, name, seed, accuracy, {}, {})
    return compare([tmp_path], METRICS, by=["name"])


@pytest.fixture
def plain(tmp_path, made_runs):
    for place, stack in enumerate((["finetune"], ["replay"], ["fedprox"])):
        for seed in range(7):
            accuracy = 0.5 + 0.05 * place + 0.01 * ((seed * (place + 2)) % 5)
            made_runs.make_run(tmp_path / "runs", "-".join(stack), seed, accuracy, {"strategy": stack}, {})
    return tmp_path / "runs"


def test_csv_reads_back(odd):
    rows = list(csv.DictReader(io.StringIO(as_csv(odd))))
    assert tuple(rows[0]) == COLUMNS
    labels = {method.label for method in odd.methods}
    assert {row["method"] for row in rows} == labels
    assert all(any(name in label for label in labels) for name in ODD)
    for row in rows:
        if row["kind"] == "method":
            estimate = odd.estimates[row["metric"]][row["method"]]
            assert float(row["mean"]) == estimate.mean
            assert float(row["low"]) == estimate.low
    pairs = [row for row in rows if row["kind"] == "pair"]
    assert len(pairs) == len(METRICS) * 15
    assert {row["holm_p"] for row in pairs} == {""}


def test_markdown_tables_have_as_many_cells_as_columns(odd):
    text = markdown(odd)
    table = [line for line in text.splitlines() if line.startswith("|")]
    cells = [re.split(r"(?<!\\)\|", line) for line in table]
    assert {len(row) for row in cells} == {9}
    assert r"a\_b\|c" in text
    assert r"\*\~^\{\}\<\>" in text
    assert "[ünï]".replace("[", r"\[").replace("]", r"\]") in text
    assert not re.search(r"(?<!\\)[_<>~]", text)


def test_latex_is_escaped_and_balanced(odd):
    text = latex(odd)
    body = [line for line in text.splitlines() if not line.startswith("%")]
    rows = [line for line in body if line.endswith(r"\\")]
    widths = {len(re.findall(r"(?<!\\)&", row)) for row in rows}
    assert widths == {4, 6}
    assert text.count(r"\toprule") == text.count(r"\bottomrule") == text.count(r"\midrule") == 2
    assert r"a\_b\textbar{}c" in text
    assert r"50\% \& \$x\$ \#1" in text
    assert r"{*}\textasciitilde{}\textasciicircum{}\{\}\textless{}\textgreater{}" in text
    assert "Größe α→β" in text
    for line in body:
        plain = re.sub(r"\\[%&$#_{}\\]", "", line)
        assert plain.count("{") == plain.count("}")
        assert plain.count("$") % 2 == 0
        assert not re.search(r"[%#~]", plain)
        assert not re.match(r"[\[*]", plain), "would be an argument of the row before"


def test_the_terminal_shows_names_as_they_are(odd):
    text = terminal(odd, width=200)
    for name in ODD:
        assert name in text
    assert max(map(len, terminal(odd, width=60).splitlines())) > 60  # sentences are the terminal's to wrap
    tables = [line for line in terminal(odd, width=70).splitlines() if "─" in line]
    assert max(map(len, tables)) <= 70


def test_every_form_tells_notes_and_broken_folders(plain, made_runs):
    broken = made_runs.make_run(plain, "gone", 0, 0.5, {}, {"status": "failed", "cause": "no memory"})
    (plain / "fedprox" / "seed-6" / "summary.json").unlink()
    found = compare([plain], METRICS)
    for name in ("terminal", "markdown", "latex", "json"):
        text = FORMATS[name](found).replace("\\", "")
        assert "failed: no memory" in text, name
        assert str(broken) in text, name
        assert "seeds differ" in text, name
        assert "seed-6" in text, name


def test_json_is_one_strict_object(plain):
    found = json.loads(FORMATS["json"](compare([plain], METRICS, baseline="finetune")))
    assert found["baseline"] == "finetune"
    assert [m["label"] for m in found["methods"]] == ["fedprox", "replay", "finetune"]
    values = found["methods"][0]["values"]["average_accuracy"]
    assert values["n"] == 7
    assert values["low"] < values["mean"] < values["high"]
    assert found["methods"][0]["folders"][0].endswith("fedprox/seed-0")
    assert {pair["other"] for pair in found["pairs"]} == {"finetune"}


@pytest.mark.parametrize(
    ("ending", "start"),
    [("md", "**average"), ("tex", "%"), ("csv", "kind,"), ("json", "{"), ("txt", "average accuracy")],
)
def test_the_ending_of_out_is_the_format(plain, tmp_path, capsys, ending, start):
    file = tmp_path / f"table.{ending}"
    assert run_command_line(["compare", str(plain), "--metric", "average_accuracy, bytes_up", "--out", str(file)]) == 0
    printed = capsys.readouterr().out
    assert printed == file.read_text()
    assert printed.lstrip().startswith(start)


def test_wrong_use_is_one_line_and_code_2(plain, tmp_path, capsys):
    wrong = [
        (["--format", "html"], "--format='html'"),
        (["--out", str(tmp_path / "x.doc")], ".md, .tex"),
        (["--metric", "acuracy"], "--metric='acuracy'"),
        (["--by", "nothing"], "--by='nothing'"),
        (["--baseline", "replai"], "Did you mean 'replay'?"),
        (["--json", "--format", "csv"], "--json"),
    ]
    for arguments, told in wrong:
        assert run_command_line(["compare", str(plain), *arguments]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert told in captured.err
        assert captured.err.count("\n") == 1
    assert run_command_line(["compare", str(tmp_path / "nowhere")]) == 2
    assert "is no folder" in capsys.readouterr().err
    assert run_command_line(["compare"]) == 2


def test_out_that_cannot_be_written(plain, tmp_path, capsys):
    assert run_command_line(["compare", str(plain), "--out", str(tmp_path / "no" / "x.md")]) == 1
    assert "cannot write" in capsys.readouterr().err


def test_csv_keeps_notes_off_standard_output(plain, capsys):
    (plain / "fedprox" / "seed-6" / "summary.json").unlink()
    assert run_command_line(["compare", str(plain), "--format", "csv"]) == 0
    captured = capsys.readouterr()
    assert {len(row) for row in csv.reader(io.StringIO(captured.out))} == {len(COLUMNS)}
    assert "left out" in captured.err


def test_real_runs_end_to_end(tiny, tmp_path, capsys):
    """Two strategies, three seeds, and one method that is another by name only."""
    folder = str(tmp_path / "all")
    stacks = {"finetune": {}, "fedprox": {"options.fedprox.mu": 0.5}, "nearest_mean": {}}
    for name, options in stacks.items():
        for seed in range(3):
            tiny({"strategy": [name], "name": name, "seed": seed, "output.dir": folder, **options})
    tiny({"strategy": ["fedprox"], "options.fedprox.mu": 0.5, "name": "again", "seed": 1, "output.dir": folder})
    assert run_command_line(["compare", folder, "--json", "--baseline", "finetune"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {m["label"]: m["seeds"] for m in found["methods"]} == {name: [0, 1, 2] for name in stacks}
    assert len(found["left_out"]) == 1
    assert "is the same run as" in found["left_out"][0]["why"]
    for method in found["methods"]:
        accuracies = [
            json.loads((tmp_path / "all" / method["label"] / f"seed-{seed}" / "summary.json").read_text())
            for seed in range(3)
        ]
        mean = sum(summary["average_accuracy"] for summary in accuracies) / 3
        assert method["values"]["average_accuracy"]["mean"] == pytest.approx(mean)
    assert all(pair["p"] is None for pair in found["pairs"])
    assert all("too few seeds for a rank test" in p["words"] or p["verdict"] == "identical" for p in found["pairs"])
    tiny({"name": "longer", "federation.rounds": 3, "output.dir": folder})
    with pytest.raises(UsageError, match=r"federation\.rounds"):
        compare([tmp_path / "all"])

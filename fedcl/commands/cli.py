"""The command line. Everything heavy is imported inside the commands, so that ``--help`` answers at once."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import click
import typer

from .. import __version__
from ..errors import FedclError, UsageError
from . import cli_plugins
from .crash import complain, crash_report, stored, usage_text

if TYPE_CHECKING:
    from ..config import Config
    from ..run import RunResult

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    help="Federated continual learning of image representations.",
    epilog="First steps: 'fedcl demo', then 'fedcl list presets' and 'fedcl run PRESET key=value ...'.",
)

Arguments = Annotated[
    list[str] | None,
    typer.Argument(metavar="[CONFIG|PRESET] [KEY=VALUE]...", help="Settings; without, the default stack."),
]
Seed = Annotated[int | None, typer.Option(metavar="N", help="Seed of everything random.")]
Out = Annotated[str | None, typer.Option(metavar="DIR", help="Output directory (default: runs).")]
Runtime = Annotated[str | None, typer.Option(metavar="local|ray|deploy", help="Where clients run.")]
Device = Annotated[str | None, typer.Option(metavar="auto|cpu|cuda[:i]", help="Where tensors live.")]
DataRoot = Annotated[str | None, typer.Option(metavar="DIR", help="Datasets; also FEDCL_DATA_ROOT.")]
Plugins = Annotated[list[str] | None, typer.Option("--plugin", metavar="FILE.py", help="More strategies; repeatable.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress.")]
Json = Annotated[bool, typer.Option("--json", help="Only JSON on standard output.")]


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Federated continual learning of image representations."""
    if version:
        typer.echo(f"fedcl {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def demo(
    seed: Seed = None,
    out: Out = None,
    device: Device = None,
    runtime: Runtime = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Compare finetune with the default stack on real digit images, in about a minute."""
    config = _config(None, [], seed=seed, out=out, runtime=runtime, device=device)
    with crash_report(Path(config.output.dir)):
        from ..tell.progress import make_progress
        from .demo import demo as play

        result = play(config, progress=make_progress(quiet, sys.stderr))
    _print_json(result.summary) if as_json else typer.echo(result.text)


@app.command()
def run(
    arguments: Arguments = None,
    seed: Seed = None,
    out: Out = None,
    runtime: Runtime = None,
    device: Device = None,
    data_root: DataRoot = None,
    plugin: Plugins = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Run one experiment."""
    source, overrides = _split_arguments(arguments)
    config = _config(source, overrides, seed, out, runtime, device, data_root, plugin)
    with crash_report(_folder(config)):
        from ..run import execute
        from ..tell.progress import make_progress

        result = execute(config, progress=make_progress(quiet, sys.stderr))
    _print_result(result, as_json)


@app.command()
def sweep(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="[CONFIG|PRESET] [KEY=A,B]...", help="Settings; KEY=A,B takes each value in turn."),
    ] = None,
    seeds: Annotated[str | None, typer.Option(metavar="0-4", help="Seeds of each variant; also 0,2,7.")] = None,
    workers: Annotated[int | None, typer.Option(metavar="N", help="Runs at a time (default: what fits).")] = None,
    scheduler: Annotated[str, typer.Option(metavar="local|ray", help="What runs them; ray: engine.address.")] = "local",
    search: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Search KEY=LOW..HIGH[:log] and KEY=A,B: N trials a method.")
    ] = None,
    tune_on: Annotated[
        str | None, typer.Option(metavar="first:K|stream:SEED", help="What a search may see (default: first:2).")
    ] = None,
    out: Out = None,
    device: Device = None,
    data_root: DataRoot = None,
    plugin: Plugins = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would run, and stop.")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Run a grid of settings times seeds in parallel; skips what is done, goes on with what is not."""
    from ..sweep import command, prepare, table

    source, overrides = _split_arguments(arguments)
    pairs = {"output.dir": out, "engine.device": device, "data.root": data_root}
    options = tuple((key, value) for key, value in pairs.items() if value is not None)
    plugins = tuple(_load_plugins(plugin))
    asked = prepare.Asked(source, tuple(overrides), options, plugins, seeds, workers, scheduler, search, tune_on, quiet)
    if dry_run:
        planned = command.dry_run(asked)
        _print_json(planned) if as_json else typer.echo(table.planned_text(planned))
        return
    swept = command.sweep(asked)
    _print_json(swept.as_objects()) if as_json else typer.echo(swept.text)
    swept.check()


@app.command()
def resume(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Folder of the interrupted run.")],
    data_root: DataRoot = None,
    plugin: Plugins = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Continue an interrupted run to the same final hashes."""
    _load_plugins(plugin)
    with crash_report(run_dir):
        from ..run import resume as go_on
        from ..tell.progress import make_progress

        result = go_on(run_dir, progress=make_progress(quiet, sys.stderr), data_root=data_root)
    _print_result(result, as_json)


@app.command("list")
def list_(
    kind: Annotated[str, typer.Argument(metavar="KIND")],
    data_root: DataRoot = None,
    plugin: Plugins = None,
    as_json: Json = False,
) -> None:
    """List strategies, scenarios, partitions, encoders, datasets, presets, protocols, probes or plots."""
    from .listing import KINDS, rows

    if kind not in KINDS:
        raise UsageError("KIND", kind, f"must be one of {', '.join(KINDS)}", KINDS)
    _load_plugins(plugin)
    found = rows(kind, data_root)
    if as_json:
        _print_json([row.as_object() for row in found])
        return
    names = [row.name + (f" ({', '.join(row.aliases)})" if row.aliases else "") for row in found]
    widths = [max(map(len, column), default=0) for column in (names, [row.family for row in found])]
    for name, row in zip(names, found, strict=True):
        columns = [
            f"{name:<{widths[0]}}",
            *([f"{row.family:<{widths[1]}}"] if widths[1] else []),
            row.summary,
        ]
        typer.echo("  ".join(columns).rstrip())


@app.command()
def show(
    name: Annotated[str, typer.Argument(metavar="NAME")],
    plugin: Plugins = None,
    as_json: Json = False,
) -> None:
    """Show the card of a strategy, scenario, partition or protocol."""
    from rich.console import Group

    from ..cards import card_object, render_card
    from ..settings import protocols
    from .listing import find_classes

    _load_plugins(plugin)
    protocol = protocols.find(name)
    if protocol is None:
        classes = find_classes(name)
        found, drawn = card_object(classes[0]), Group(*map(render_card, classes))
    else:
        found, drawn = protocol.as_object(), Group(protocols.render(protocol))
    if as_json:
        _print_json(found)
        return
    from rich.console import Console

    Console(file=sys.stdout, highlight=False).print(drawn)


@app.command()
def split(
    arguments: Arguments = None,
    seed: Seed = None,
    out: Out = None,
    data_root: DataRoot = None,
    plugin: Plugins = None,
    as_json: Json = False,
) -> None:
    """Show how a task's classes are split over the clients, as a table and a picture."""
    source, overrides = _split_arguments(arguments)
    config = _config(source, overrides, seed=seed, out=out, data_root=data_root, plugin=plugin)
    from ..run import build_split
    from ..streams.split import draw_split, split_summary, split_table, split_warnings
    from ..tell.quiet import quiet_libraries

    with quiet_libraries(lambda record: None):
        stream, parts, names = build_split(config)
        # Beside the run folders: a run's own folder must be empty when it starts.
        picture = _folder(config).with_name(f"split-seed-{config.seed}.png")
        try:
            picture.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError("output.dir", config.output.dir, f"cannot be written: {error.strerror}") from error
        draw_split(parts, stream, names, picture)
    if as_json:
        _print_json({**split_summary(parts, stream, names), "picture": str(picture)})
    else:
        typer.echo(split_table(parts, stream, names))
        typer.echo(f"picture: {picture}")
    for line in split_warnings(parts, stream, names):
        typer.echo(f"fedcl: warning: {line}", err=True)


@app.command()
def plot(
    kind: Annotated[str, typer.Argument(metavar="KIND", help="See 'fedcl list plots'.")],
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Runs, or folders with runs in them.")],
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Where to (default: plots/ by the runs).")] = None,
    format_: Annotated[
        str | None, typer.Option("--format", metavar="A,B", help="png, svg, pdf (default: png,svg).")
    ] = None,
    by: Annotated[str | None, typer.Option(metavar="A,B", help="Settings that alone tell methods apart.")] = None,
    method: Annotated[str, typer.Option(metavar="pca|tsne", help="features: how to come to two dimensions.")] = "pca",
    key: Annotated[str | None, typer.Option(metavar="KEY", help="memory: setting or number on the axis.")] = None,
    title: Annotated[str | None, typer.Option(metavar="TEXT", help="In place of the usual title; '' for none.")] = None,
) -> None:
    """Draw finished runs: seeds together, methods in one picture where the kind compares them."""
    from ..plots.command import plot_folders

    drawn = plot_folders(kind, folders, out=out, formats=format_, by=by, method=method, key=key, title=title)
    for path in drawn.paths:
        typer.echo(str(path))
    for note in drawn.notes:
        typer.echo(f"fedcl: {note}", err=True)


@app.command()
def compare(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Runs, or folders with runs in them.")],
    metric: Annotated[str | None, typer.Option(metavar="A,B", help="Numbers of summary.json to compare.")] = None,
    by: Annotated[str | None, typer.Option(metavar="A,B", help="Settings that alone tell methods apart.")] = None,
    baseline: Annotated[str | None, typer.Option(metavar="NAME", help="Test the others against this method.")] = None,
    format_: Annotated[
        str | None, typer.Option("--format", metavar="NAME", help="terminal, markdown, latex, csv or json.")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write here too; the ending says how.")] = None,
    across_protocols: Annotated[
        bool, typer.Option("--across-protocols", help="Compare runs of different protocols nevertheless.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Compare methods over seeds: intervals, paired tests, ranks, the verdict in words."""
    from ..compare.command import compare_folders

    if as_json and format_ not in (None, "json"):
        raise UsageError("--format", format_, "cannot be given with --json", ["json"])
    format_ = "json" if as_json else format_
    typer.echo(compare_folders(folders, metric, by, baseline, format_, out, across_protocols))


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Runs, or folders with runs in them.")],
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="HTML file (default: report.html there).")] = None,
    across_protocols: Annotated[
        bool, typer.Option("--across-protocols", help="Compare runs of different protocols nevertheless.")
    ] = False,
) -> None:
    """Write one HTML file about a run, or about how several runs compare."""
    from ..report import write_report

    written = write_report(folders, out, across_protocols)
    typer.echo(written.said())
    for note in written.notes:
        typer.echo(f"fedcl: {note}", err=True)


app.command()(cli_plugins.check)
app.command()(cli_plugins.new)


@app.command()
def doctor(out: Out = None, data_root: DataRoot = None, as_json: Json = False) -> None:
    """Show versions, device, data found and what is missing."""
    from ..config import Output
    from .doctor import describe, examine

    report = examine(data_root, Path(out or Output().dir))
    _print_json(report) if as_json else typer.echo(describe(report))
    if not report["ok"]:
        raise typer.Exit(1)


@app.command()
def bench(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[engine.KEY=VALUE]...", help="How fedcl computes; the work is the same for all."),
    ] = None,
    workload: Annotated[
        str, typer.Option(metavar="NAME", help="mlp-100, lenet-100, cnn-50, all (these three), resnet18 or scaling.")
    ] = "mlp-100",
    rounds: Annotated[int, typer.Option(metavar="N", min=1, help="Measured rounds, after a first one.")] = 7,
    peers: Annotated[str | None, typer.Option(metavar="A,B", help="Among fedcl, loop, pfl, flower-ray.")] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder for JSON and chart (default: bench).")] = None,
    device: Device = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Measure seconds a round against the installed peers, in turns."""
    from ..bench.command import measure_all

    measured = measure_all(
        workload, rounds, peers, overrides or [], device, out, write_default=not as_json, quiet=quiet
    )
    _print_json(measured.content) if as_json else typer.echo(measured.text)
    measured.check()


@app.command()
def tune(
    arguments: Arguments = None,
    rounds: Annotated[int, typer.Option(metavar="N", min=1, help="Measured rounds a trial.")] = 3,
    device: Device = None,
    data_root: DataRoot = None,
    plugin: Plugins = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Measure the engine settings for a run on this machine, and keep the fastest for later runs."""
    from ..local.tune import Trial
    from ..local.tune import tune as measure

    source, overrides = _split_arguments(arguments)
    config = _config(source, overrides, None, None, None, device, data_root, plugin)

    def tell(trial: Trial) -> None:
        if not quiet:
            typer.echo(trial.line(), err=True)

    found = measure(config, rounds, tell)
    if as_json:
        _print_json(found.json())
        return
    typer.echo(f"fastest for {found.name}: {found.best.line()}")
    typer.echo(f"kept in {found.path}; runs of this model use it where engine.path=auto")


def run_command_line(arguments: Sequence[str]) -> int:
    """Runs one command and returns the exit code; errors become one line on standard error."""
    try:
        code = typer.main.get_command(app).main(list(arguments), prog_name="fedcl", standalone_mode=False)
        sys.stdout.flush()
    except FedclError as error:
        return complain(str(error), error.exit_code)
    except click.ClickException as error:
        return complain(usage_text(error), UsageError.exit_code)
    except (KeyboardInterrupt, click.Abort):
        return complain("interrupted", 130)
    except BrokenPipeError:
        # The interpreter flushes once more when it exits, which must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1
    except Exception as error:
        return complain(stored(error, None), 1)
    return code if isinstance(code, int) else 0


def _split_arguments(arguments: Sequence[str] | None) -> tuple[str | None, list[str]]:
    given = list(arguments or [])
    # A path with '=' in it has a slash or a dash before the sign, or is there.
    first = given[0] if given else None
    if first is None or (re.match(r"[A-Za-z_][\w.]*=", first) and not Path(first).is_file()):
        return None, given
    return first, given[1:]


def _config(
    source: str | None,
    overrides: Sequence[str],
    seed: int | None = None,
    out: str | None = None,
    runtime: str | None = None,
    device: str | None = None,
    data_root: str | None = None,
    plugin: Sequence[str] | None = None,
) -> Config:
    """Settings from the command line; options stand for keys, so giving both is an error."""
    from ..config import load_config

    keys = {
        "seed": seed,
        "output.dir": out,
        "engine.runtime": runtime,
        "engine.device": device,
        "data.root": data_root,
    }
    loaded = _load_plugins(plugin)
    pairs = [(key, value) for key, value in keys.items() if value is not None]
    config = load_config(source, [*overrides, *pairs])
    config.plugins += [path for path in loaded if path not in config.plugins]
    return config


def _load_plugins(files: Sequence[str] | None) -> list[str]:
    if not files:
        return []
    from ..registry import add_plugin

    return [str(add_plugin(file).path) for file in files]


def _folder(config: Config) -> Path:
    return Path(config.output.dir) / config.name / f"seed-{config.seed}"


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, allow_nan=False))


def _print_result(result: RunResult, as_json: bool) -> None:
    if as_json:
        _print_json(result.summary)
        return
    from ..tell.progress import percent, size

    summary = result.summary
    if summary.get("status") == "stopped":
        typer.echo(f"stopped: {summary['cause']}; go on with: fedcl resume {result.folder}")
        return
    keys = ("average_accuracy", "average_incremental_accuracy", "forgetting", "backward_transfer")
    rows = [(key.replace("_", " "), percent(summary.get(key))) for key in keys]
    rows += [(f"bytes {way}", size(summary[f"bytes_{way}"])) for way in ("up", "down") if summary.get(f"bytes_{way}")]
    rows.append(("model sha256", str(summary.get("model_sha256"))[:16]))
    rows.append(("results in", str(result.folder)))
    for name, text in rows:
        typer.echo(f"{name:<30}{text}")

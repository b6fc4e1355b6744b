"""Who holds what: rebuilt from the settings of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import RunFailed
from ..records.runs import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .drawing import Options


def split_figure(run: Run, options: Options) -> Figure:
    """Training images by class, client and task: a panel a task, see :func:`fedcl.streams.split.split_picture`.

    The split is built again from ``config.yaml``, so the data have to be there.

    Raises:
        UsageError: the data are not there.
        RunFailed: the data are not those that the run began with.
    """
    from ..build import build_split, split_hash
    from ..config import load_config
    from ..streams.split import split_picture
    from ..tell.quiet import quiet_libraries

    config = load_config(run.folder / "config.yaml")
    with quiet_libraries(lambda record: None):
        stream, split, names = build_split(config)
    recorded = run.summary.get("split_sha256")
    if recorded is not None and split_hash(stream, split) != recorded:
        raise RunFailed(f"{run.folder}: the data or its split are not those this run began with")
    return split_picture(split, stream, names, options.title)

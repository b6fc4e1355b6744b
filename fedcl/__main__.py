"""``python -m fedcl`` and the console script."""

from __future__ import annotations

import sys


def main() -> None:
    """Runs the command line and exits with its code."""
    from .commands.cli import run_command_line

    sys.exit(run_command_line(sys.argv[1:]))


if __name__ == "__main__":
    main()

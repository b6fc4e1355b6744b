"""One self-contained HTML file about finished runs: of one run, or a comparison of several."""

from .command import Written, write_report

__all__ = ["Written", "write_report"]

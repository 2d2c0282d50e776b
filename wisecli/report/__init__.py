"""Reading a results.json of `wise eval` and showing it: one page, its plots, and results side by side.

    from wisecli.report import read_results, write_report

    write_report(read_results(Path("results.json")), Path("report.html"))

Names are loaded when first used: reading and comparing need no matplotlib.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wisecli.report.compare import compare_results, write_comparison
    from wisecli.report.page import write_report
    from wisecli.report.plots import write_plots
    from wisecli.report.results import check_results, read_results

_HOME = {
    "check_results": "wisecli.report.results",
    "compare_results": "wisecli.report.compare",
    "read_results": "wisecli.report.results",
    "write_comparison": "wisecli.report.compare",
    "write_plots": "wisecli.report.plots",
    "write_report": "wisecli.report.page",
}

__all__ = ["check_results", "compare_results", "read_results", "write_comparison", "write_plots", "write_report"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'wisecli.report' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)

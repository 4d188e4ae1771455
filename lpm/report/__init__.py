"""The figures of a run and its page, `report.html`, which stands alone."""

from lpm.report.material import (
    Fact,
    Fit,
    Material,
    Panel,
    Score,
    summarise_outputs,
    summarise_parameters,
    tabulate_fits,
)
from lpm.report.page import write_report

__all__ = [
    "Fact",
    "Fit",
    "Material",
    "Panel",
    "Score",
    "summarise_outputs",
    "summarise_parameters",
    "tabulate_fits",
    "write_report",
]

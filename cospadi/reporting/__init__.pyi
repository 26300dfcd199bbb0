from .environment import machine, versions
from .schema import GroupRow, KeptLayer, Machine, MemberRow, Report, RunFacts, Totals
from .summary import totals, write_report, write_run

__all__ = [
    "GroupRow",
    "KeptLayer",
    "Machine",
    "MemberRow",
    "Report",
    "RunFacts",
    "Totals",
    "machine",
    "totals",
    "versions",
    "write_report",
    "write_run",
]

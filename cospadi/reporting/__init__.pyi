from .report import Report, machine, totals, versions, write_report

__all__ = ["Report", "machine", "totals", "versions", "write_report"]

"""The report: one self-contained HTML file that answers how much should be shared."""

from bayestie._report._report import report

__all__ = ["report"]

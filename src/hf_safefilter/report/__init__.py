"""A scored dataset as one page to look at before rows are deleted."""

from .content import Content, gather
from .page import Report, scored_report

__all__ = ["Content", "Report", "gather", "scored_report"]

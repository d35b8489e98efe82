"""The report: one self-contained HTML page from what run folders hold."""

from ultrathink_model.reporting.page import report_html, write_report

__all__ = ["report_html", "write_report"]

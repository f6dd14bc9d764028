from funcattrib.report.table import Line, render

__all__ = ["Line", "render"]

from funcattrib.report.table import Hit, render

__all__ = ["Hit", "render"]

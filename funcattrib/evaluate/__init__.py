"""Measures of attribution against known answers."""

from funcattrib.evaluate.bm25 import bm25
from funcattrib.evaluate.retrieval import mean_reciprocal_rank, recall_at

__all__ = ["bm25", "mean_reciprocal_rank", "recall_at"]

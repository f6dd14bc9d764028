"""Reading, tokenising and batching."""

from funcattrib.data.batching import IGNORED, collate, plan, shard_ranges
from funcattrib.data.fingerprint import fingerprint
from funcattrib.data.read import load
from funcattrib.data.report import TokenizeReport
from funcattrib.data.rows import Rows
from funcattrib.data.tokenize import Columns, Tokenized, tokenize

__all__ = [
    "load",
    "Columns",
    "Tokenized",
    "TokenizeReport",
    "tokenize",
    "Rows",
    "IGNORED",
    "shard_ranges",
    "plan",
    "collate",
    "fingerprint",
]

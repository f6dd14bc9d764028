"""Reading, tokenising and batching."""

from funcattrib.data.advantages import advantages
from funcattrib.data.batching import IGNORED, collate, plan, shard_ranges
from funcattrib.data.columns import Columns
from funcattrib.data.fingerprint import fingerprint
from funcattrib.data.number_columns import number_columns
from funcattrib.data.read import load
from funcattrib.data.report import TokenizeReport, some_rows
from funcattrib.data.rows import Rows
from funcattrib.data.tokenize import Tokenized, tokenize

__all__ = [
    "load",
    "advantages",
    "number_columns",
    "some_rows",
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

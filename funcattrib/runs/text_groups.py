"""The documents of a corpus by their text: those that differ in nothing but form, case and white space are a group."""

import hashlib

import torch
from jaxtyping import Int
from torch import Tensor

from funcattrib.data.corpus import Corpus
from funcattrib.data.normal_text import normal_text
from funcattrib.store.metadata import example_text

_BLOCK = 1024


def text_groups(corpus: Corpus) -> Int[Tensor, " rows"]:
    """Return each document's group: the first row with its text (``normal_text``); its own row where it has no text.

    Example:
        >>> from funcattrib.data.numeric_examples import Examples
        >>> text_groups(Examples([{"x": [1.0]}, {"x": [1.0]}]))  # no text
        tensor([0, 1])
    """
    first: dict[bytes, int] = {}
    groups: list[int] = []
    for start in range(0, len(corpus.lengths), _BLOCK):
        rows = range(start, min(start + _BLOCK, len(corpus.lengths)))
        columns = corpus.metadata(rows)
        for place, row in enumerate(rows):
            example = {name: values[place] for name, values in columns.items()}
            text = normal_text(example_text(example, corpus.text_columns))
            key = hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=16).digest()
            groups.append(first.setdefault(key, row) if text else row)
    return torch.tensor(groups, dtype=torch.int64)

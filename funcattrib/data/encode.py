"""Text to tokens and labels: a token is labelled where it covers characters whose loss counts."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from funcattrib.data.batching import IGNORED
from funcattrib.data.utf8 import half_character, has_half_character
from funcattrib.errors import DataError
from funcattrib.runtime.hub import reason


class Text(NamedTuple):
    """A document and the character ranges whose loss counts (None: all of it, special tokens included)."""

    text: str
    spans: list[tuple[int, int]] | None


class Encoded(NamedTuple):
    """Tokens and labels of some documents (int32, one array each), and how many of them were cut."""

    ids: list[np.ndarray]
    labels: list[np.ndarray]
    truncated: int


def encode(
    documents: Sequence[Text],
    tokenizer: PreTrainedTokenizerBase,
    *,
    special_tokens: bool,
    max_length: int,
    truncation: bool,
    first_row: int = 0,
) -> Encoded:
    """Tokenise documents, as `tokenizer(text)` does.

    A token that reaches into a labelled span is labelled, so where the tokenizer merges across a border the border
    token counts. Special tokens that end a document (EOS) share the label of the token before them.

    Args:
        documents: the texts.
        tokenizer: fast (with character offsets) or slow.
        special_tokens: whether the tokenizer adds its own (a chat template has written them already).
        max_length: most tokens in a document.
        truncation: whether a longer one is cut, as the tokenizer cuts, or is an error.
        first_row: number of the first document, for messages.

    Raises:
        DataError: the tokenizer refuses a document.
        TooLong: documents that are too long.
    """
    offsets_wanted = any(document.spans is not None for document in documents) and tokenizer.is_fast
    # Without offsets the labels need the whole text, so there the cut comes afterwards.
    cut_here = truncation and (offsets_wanted or all(document.spans is None for document in documents))
    settings: dict[str, Any] = {
        "add_special_tokens": special_tokens,
        "return_attention_mask": False,
        "return_token_type_ids": False,
        "verbose": False,  # no warning for documents above the model's context: they are dealt with below
    }
    limits: dict[str, Any] = {"truncation": True, "max_length": max_length} if cut_here else {}
    try:
        found = tokenizer(
            [document.text for document in documents],
            return_offsets_mapping=offsets_wanted,
            return_special_tokens_mask=offsets_wanted,
            **settings,
            **limits,
        )
    except UnicodeEncodeError as error:
        broken = next(n for n, document in enumerate(documents) if has_half_character(document.text))
        raise half_character(documents[broken].text, f"the text in row {first_row + broken}") from error
    except Exception as error:  # the Rust tokenizers raise bare Exception
        raise DataError(
            f"the tokenizer failed on rows {first_row} to {first_row + len(documents) - 1}: {reason(error)}\n"
            "check these rows, and that the tokenizer has an unknown token"
        ) from error

    ids = [np.array(row, dtype=np.int32) for row in found["input_ids"]]
    labels = []
    for number, (document, row) in enumerate(zip(documents, ids, strict=True)):
        if document.spans is None:
            labels.append(row)
            continue
        if offsets_wanted:
            offsets = np.array(found["offset_mapping"][number], np.int64).reshape(-1, 2)
            # A blank at the very beginning is trimmed to (0, 0) as well, where added special tokens are.
            added = np.array(found["special_tokens_mask"][number], bool)
            offsets[(offsets[:, 1] == 0) & ~added] = 0, 1
            counted = _covered(offsets, document.spans)
        else:
            counted = _covered_by_prefixes(row, document, tokenizer, settings)
        labels.append(np.where(counted, row, np.int32(IGNORED)))

    lengths = [len(row) for row in ids]
    if cut_here:
        full = [number for number, length in enumerate(lengths) if length == max_length]
        return Encoded(ids, labels, sum(_was_cut(documents[n], found, n, tokenizer, settings) for n in full))
    long = [number for number, length in enumerate(lengths) if length > max_length]
    if long and not truncation:
        raise TooLong([(first_row + number, lengths[number]) for number in long])
    return Encoded([row[:max_length] for row in ids], [row[:max_length] for row in labels], len(long))


class TooLong(Exception):
    """Documents above the longest length, where truncation was not asked for: the number and the length of each."""

    def __init__(self, rows: list[tuple[int, int]]) -> None:
        super().__init__(rows)
        self.rows = rows


def _covered(offsets: np.ndarray, spans: Sequence[tuple[int, int]]) -> np.ndarray:
    """Return which tokens, given as (first, last + 1) characters, reach into a span."""
    ends = offsets[:, 1]
    # A byte-level tokenizer that trims blanks gives a token of blanks no width: it stands for its last character.
    starts = np.minimum(offsets[:, 0], ends - 1)
    counted = np.zeros(len(ends), dtype=bool)
    for first, stop in spans:
        counted |= (ends > first) & (starts < stop)
    placed = np.flatnonzero(ends > 0)  # added special tokens are at (0, 0)
    if len(placed):
        counted[placed[-1] + 1 :] = counted[placed[-1]]
    return counted


def _covered_by_prefixes(
    ids: np.ndarray, document: Text, tokenizer: PreTrainedTokenizerBase, settings: dict[str, Any]
) -> np.ndarray:
    """Return the same for a tokenizer without offsets: a border lies where the tokens of the text up to it stop
    agreeing.
    """
    assert document.spans is not None

    def tokens_before(character: int) -> int:
        if character >= len(document.text):
            return len(ids)
        prefix = np.array(tokenizer(document.text[:character], **settings)["input_ids"], dtype=np.int32)
        shared = min(len(prefix), len(ids))
        differing = np.flatnonzero(prefix[:shared] != ids[:shared])
        return int(differing[0]) if len(differing) else shared

    counted = np.zeros(len(ids), dtype=bool)
    for first, stop in document.spans:
        if first < stop:
            counted[tokens_before(first) : tokens_before(stop)] = True
    return counted


def _was_cut(
    document: Text, found: Any, number: int, tokenizer: PreTrainedTokenizerBase, settings: dict[str, Any]
) -> bool:
    if found.encodings:
        return bool(found.encodings[number].overflowing)
    return len(tokenizer(document.text, **settings)["input_ids"]) > len(found["input_ids"][number])

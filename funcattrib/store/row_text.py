"""The text that a row is shown by: that of its example, or of a token's row the token inside its sentence."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from funcattrib.store.metadata import example_text

if TYPE_CHECKING:
    from datasets import Dataset

_REACH = 16  # tokens on each side


def row_text(examples: "Dataset", row: int, text_columns: Sequence[str] | None, *, by_token: bool = False) -> str:
    """Return the text of a row: its columns one after the other, or its token in brackets among those around it.

    Example:
        >>> from datasets import Dataset
        >>> tokens = Dataset.from_dict({"document": [0, 0, 0, 1], "text": ["It", " rains", ".", "No"]})
        >>> row_text(tokens, 1, ["text"], by_token=True)
        'It [rains].'
    """
    if not by_token or "document" not in examples.column_names or "text" not in examples.column_names:
        return example_text(examples[row], text_columns)
    first = max(0, row - _REACH)
    near = examples[first : row + _REACH + 1]
    place, document = row - first, near["document"][row - first]
    words = [str(text) for text, at in zip(near["text"], near["document"], strict=True) if at == document]
    at = place - next(number for number, each in enumerate(near["document"]) if each == document)
    return _marked(words, at)


def _marked(words: Sequence[str], at: int) -> str:
    token = words[at]
    bare = token.strip()
    before = " " if token[:1].isspace() else ""
    parts = [*words[:at], f"{before}[{bare or token}]", *words[at + 1 :]]
    # Tokens of some vocabularies carry no space of their own when each is decoded alone.
    spaced = any(word[:1].isspace() or word[-1:].isspace() for word in words)
    return ("" if spaced else " ").join(parts).strip()

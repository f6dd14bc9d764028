"""The columns of a data set, by what they hold."""

import json
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import datasets

from funcattrib.errors import DataError


@dataclass(frozen=True)
class Columns:
    """The columns of a data set by what they hold, which decides the tokens that count in the loss, and how much.

    Args:
        prompt_column: text; the loss counts every token, or none where there is a completion. By default ``text``, or
            the tokens of a data set that has ``input_ids``.
        completion_column: text that continues the prompt; the loss counts it alone. Both may be lists of messages. Of
            an encoder-decoder, the target.
        conversation_column: lists of messages (``role``, ``content``, and for a turn that does not count
            ``"weight": 0``); the loss counts the assistant's. The template is given the columns ``tools`` and
            ``chat_template_kwargs``.
        token_weights_column: what each token's loss is multiplied by, one number a row or a list of one a token.
        reward_column: numbers; the loss is multiplied by the reward less its prompt's mean.
        advantage_column: numbers that the loss is multiplied by.
        keep_columns: further columns that are kept beside each row, to be shown with it: its source, its label.
        skip_missing_rewards: rows without one keep their place, with a zero gradient, instead of being an error.
        label_column: of a sequence classification model, what each text is to be given: a class by number or name, a
            list of 0 and 1 for several, or numbers. By default ``label`` (or ``labels``).

    Raises:
        DataError: both a conversation and a completion, or both rewards and advantages; ``skip_missing_rewards``
            without either of the latter.

    Example:
        >>> Columns("question", "answer").completion_column
        'answer'
    """

    prompt_column: str | None = None
    completion_column: str | None = None
    conversation_column: str | None = None
    token_weights_column: str | None = None
    reward_column: str | None = None
    advantage_column: str | None = None
    keep_columns: tuple[str, ...] = ()
    skip_missing_rewards: bool = False
    label_column: str | None = None

    def __post_init__(self) -> None:
        """Check what a type cannot say."""
        for first, second in (("conversation_column", "completion_column"), ("reward_column", "advantage_column")):
            one, other = getattr(self, first), getattr(self, second)
            if one is not None and other is not None:
                raise DataError(f"`{first}` ('{one}') and `{second}` ('{other}') cannot be combined; leave one out")
        if self.skip_missing_rewards and self.reward_column is None and self.advantage_column is None:
            raise DataError("`skip_missing_rewards` requires `reward_column` or `advantage_column`")

    @property
    def prompt(self) -> str:
        """Return the column of text: the one that is named, or ``text``."""
        return self.prompt_column or "text"

    def ready(self, dataset: datasets.Dataset) -> bool:
        """Return whether these are the tokens of a data set that is tokenised already, and no text of it."""
        unsaid = not (self.prompt_column or self.completion_column or self.conversation_column)
        return "input_ids" in dataset.column_names and (unsaid or self.prompt_column == "input_ids")


def shown_name(name: str, taken: Collection[str]) -> str:
    """Return the name of a data set's column among the columns that the library writes itself, ``taken``.

    Example:
        >>> shown_name("document", ["id", "loss"]), shown_name("loss", ["id", "loss"])
        ('document', 'data.loss')
    """
    bare = name
    while bare.startswith("data."):  # so that two names never become one
        bare = bare.removeprefix("data.")
    return f"data.{name}" if bare in taken else name


def storable(dataset: datasets.Dataset, name: str) -> list[Any]:
    """Return a column as it is, or as JSON where its values are of several types (the arguments of tools, say), which
    no column of a store can hold.

    Example:
        >>> rows = [{"call": {"at": "now"}}, {"call": {"at": 5}}]
        >>> storable(datasets.Dataset.from_list(rows, on_mixed_types="use_json"), "call")
        ['{"at": "now"}', '{"at": 5}']
    """
    values: list[Any] = dataset.with_format(None)[name][:]
    if _is_plain(dataset.features[name]):
        return values
    return [None if value is None else json.dumps(value, ensure_ascii=False, default=str) for value in values]


def _is_plain(kind: Any) -> bool:
    if isinstance(kind, dict):
        return all(map(_is_plain, kind.values()))
    return _is_plain(kind.feature) if isinstance(kind, datasets.List) else isinstance(kind, datasets.Value)

"""The documents that a model's loss reads: tokens, texts with labels, or pairs of source and target."""

from typing import Any

import datasets
from torch import nn
from transformers import PreTrainedTokenizerBase

from funcattrib.data import Columns
from funcattrib.data.documents import Documents, read_documents
from funcattrib.data.labelled import Labelled, Labels, read_labelled
from funcattrib.data.source_target import Pairs, read_pairs
from funcattrib.losses.sequence_classification import problem_of
from funcattrib.models.limits import vocabulary
from funcattrib.models.task import Task


def read_for(
    task: Task,
    model: nn.Module,
    source: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase | None,
    columns: Columns,
    *,
    max_length: int,
    truncation: bool,
    own_loss: bool = False,
    name: str = "the data",
) -> Documents | Labelled | Pairs:
    """Tokenise a data set and lay it out as the loss of a model's task reads it.

    Args:
        own_loss: a user's loss is given the columns of numbers too.

    Raises:
        DataError: data that cannot be read, a document that is too long, a label or target that is missing.
    """
    limits: dict[str, Any] = {"max_length": max_length, "truncation": truncation, "vocab_size": vocabulary(model)}
    if task == "sequence_classification":
        config: Any = model.config
        labels = Labels(problem_of(model), int(config.num_labels), dict(config.label2id or {}))
        return read_labelled(source, tokenizer, columns, labels, name=name, **limits)
    if task == "seq2seq":
        return read_pairs(source, tokenizer, columns, name=name, **limits)
    return read_documents(source, tokenizer, columns, own_loss=own_loss, name=name, **limits)

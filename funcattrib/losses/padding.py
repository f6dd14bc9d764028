"""Padding that a model does not see: the mask hides it, and its tokens are the ones that the configuration calls so.

Some heads find a document's last token, and some models its positions, by the padding token and not by the mask.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from funcattrib.errors import FuncattribError
from funcattrib.models.functional import Functional, device_of
from funcattrib.types import Batch

LENGTHS = (8, 5)
"""Tokens of the two documents that are tried."""
_INPUTS = ("input_ids", "attention_mask", "token_type_ids")


def set_padding_token(skeleton: nn.Module) -> int | None:
    """Return the model's padding token; where it has none, its copy gets one that no document holds, and None is
    returned.
    """
    found = None
    for module in skeleton.modules():
        if isinstance(module, PreTrainedModel):
            config = module.config.get_text_config()
            if getattr(config, "pad_token_id", None) is None:
                config.pad_token_id = -1
            elif found is None and config.pad_token_id >= 0:
                found = int(config.pad_token_id)
    return found


def model_inputs(batch: Batch, pad: int | None) -> dict[str, Tensor]:
    """Return the model's part of a batch, with its padding token where the mask hides a position."""
    inputs = {name: batch[name] for name in _INPUTS if name in batch}
    if pad is not None and "attention_mask" in inputs:
        inputs["input_ids"] = torch.where(inputs["attention_mask"] != 0, inputs["input_ids"], pad)
    return inputs


def two_documents(parts: Functional) -> tuple[Batch, list[Batch]]:
    """Return two documents in a padded batch, and each by itself.

    Raises:
        FuncattribError: a model without an embedding of tokens.
    """
    weights = {**parts.frozen, **parts.params}
    embedding = getattr(parts.skeleton, "get_input_embeddings", lambda: None)()
    if embedding is None:
        raise FuncattribError(
            f"expected a model that takes tokens, found {type(parts.skeleton).__name__}\n"
            "give (loss, params) with a loss in Python that calls it"
        )
    device, size = device_of(weights), embedding.weight.shape[0]
    documents = [(torch.arange(length, device=device) * 31 + 7) % max(size - 5, 1) + 4 for length in LENGTHS]
    documents = [each.clamp(max=size - 1) for each in documents]
    ids = nn.utils.rnn.pad_sequence(documents, batch_first=True)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(each) for each in documents], batch_first=True)
    alone: list[Batch] = [
        {"input_ids": each[None], "attention_mask": torch.ones_like(each)[None]} for each in documents
    ]
    return {"input_ids": ids, "attention_mask": mask}, alone


def each_alone(parts: Functional, compute: Callable[[Batch], Tensor], documents: Sequence[Batch]) -> list[Tensor]:
    """Compute documents one by one.

    Raises:
        FuncattribError: the model does not run on tokens alone.
    """
    try:
        return [compute(each) for each in documents]
    except Exception as error:  # whatever code of others raises on these inputs
        raise FuncattribError(
            f"{type(parts.skeleton).__name__} cannot be computed on tokens alone: {str(error)[:200]}\n"
            "give (loss, params) with a loss in Python that calls it"
        ) from error

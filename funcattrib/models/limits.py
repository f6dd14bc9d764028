"""Limits of a model's input: its vocabulary and its longest document."""

from torch import nn
from transformers import (
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from funcattrib.errors import FuncattribError


def vocabulary(model: nn.Module) -> int | None:
    """Return the number of tokens in the model's vocabulary; None where the model has no input embedding."""
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    return embedding.weight.shape[0] if embedding is not None else None


def context_length(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase | None = None, *, asked: int | None = None
) -> int:
    """Return the longest document in tokens: what is asked for, else the model's context, the tokenizer's, or 2048.

    Raises:
        FuncattribError: more is asked for than the model's configuration allows.
    """
    context = own_context(getattr(model, "config", None))
    if asked is not None:
        if context is not None and asked > context:
            raise FuncattribError(
                f"expected a longest document within the model's context of {context} tokens, found {asked}"
            )
        return asked
    limit = getattr(tokenizer, "model_max_length", None)
    return context or (limit if isinstance(limit, int) and 0 < limit < 10**9 else 2048)


def own_context(config: PretrainedConfig | None) -> int | None:
    """Return the longest document that a model's configuration allows, where it states one."""
    text = config.get_text_config() if config is not None and hasattr(config, "get_text_config") else config
    names = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")
    return next((value for name in names if isinstance(value := getattr(text, name, None), int) and value > 0), None)

"""Tiny models of other tasks than causal language modelling: classifiers of texts and encoder-decoders."""

from functools import cache

import torch
import transformers
from torch import nn

VOCABULARY = 61
_TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
_BLOCK = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}
_LABELS = {"num_labels": 3, "problem_type": "single_label_classification"}
_PAIR = {"d_model": 24, "encoder_ffn_dim": 40, "decoder_ffn_dim": 40, "encoder_attention_heads": 4}

CLASSIFIERS = {
    "bert": ("Bert", {**_TOKENS, **_BLOCK, "max_position_embeddings": 64}),
    "roberta": ("Roberta", {**_TOKENS, **_BLOCK, "max_position_embeddings": 66, "pad_token_id": 1}),
    "modernbert": (
        "ModernBert",
        {**_TOKENS, **_BLOCK, "cls_token_id": 2, "sep_token_id": 3, "local_attention": 8, "classifier_pooling": "mean"},
    ),
    "llama": ("Llama", {**_TOKENS, **_BLOCK, "num_key_value_heads": 2}),
    "llama_without_padding": ("Llama", {**_TOKENS, **_BLOCK, "num_key_value_heads": 2, "pad_token_id": None}),
}
PAIRS = {
    "t5": ("T5", {"vocab_size": VOCABULARY, "d_model": 24, "d_kv": 6, "d_ff": 40, "num_layers": 2, "num_heads": 4}),
    "bart": (
        "Bart",
        {**_TOKENS, **_PAIR, "encoder_layers": 2, "decoder_layers": 2, "decoder_attention_heads": 4},
    ),
}


@cache
def classifier(name: str, num_labels: int = 3, problem: str | None = "single_label_classification") -> nn.Module:
    """Make a classifier in float32, in eval mode, its weights large enough for logits that matter."""
    stem, settings = CLASSIFIERS[name]
    config = getattr(transformers, f"{stem}Config")(**settings, num_labels=num_labels, problem_type=problem)
    return _scaled(getattr(transformers, f"{stem}ForSequenceClassification"), config)


@cache
def pair(name: str) -> nn.Module:
    """Make an encoder-decoder in float32, in eval mode."""
    stem, settings = PAIRS[name]
    config = getattr(transformers, f"{stem}Config")(**{**settings, "pad_token_id": 0, "decoder_start_token_id": 0})
    return _scaled(getattr(transformers, f"{stem}ForConditionalGeneration"), config)


def _scaled(kind: type, config: transformers.PretrainedConfig) -> nn.Module:
    torch.manual_seed(0)
    model = kind(config).eval()
    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.ndim > 1:
                tensor.normal_(std=0.3 if tensor.shape[0] < 50 else 0.5)
    return model

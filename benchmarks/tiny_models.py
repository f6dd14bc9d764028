"""A tiny model of every kind of causal language model in transformers, with random weights.

A configuration takes whatever sizes of ``SIZES`` its class has, without those that contradict each other in it
(``WITHOUT``); what a kind needs beside them stands in ``BY_KIND``.
"""

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

KINDS = tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
VOCABULARY = 131
LARGEST = 20e6
"""Parameters of a model that is still tiny."""

SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "attention_hidden_size", "moe_intermediate_size"), 32),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "d_ff"), 48),
    **dict.fromkeys(("hidden_dim", "ffn_hidden_size"), 48),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads", "num_local_experts", "num_experts"), 4),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_key_value_heads", "num_experts_per_tok"), 2),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 64),
    **dict.fromkeys(("head_dim", "d_kv", "state_size"), 8),
    **dict.fromkeys(("dropout", "attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
    **dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0),
    "n_routed_experts": 4,
    "vocab_size": VOCABULARY,
    "is_decoder": True,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

WITHOUT: tuple[tuple[str, ...], ...] = (
    (),
    ("head_dim",),
    ("num_key_value_heads",),
    ("head_dim", "num_key_value_heads"),
    ("moe_intermediate_size",),
    ("num_heads", "head_dim"),
)

_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8}
_LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 8,
    "q_lora_rank": 12,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "qk_nope_head_dim": 8,
    "head_dim": 4,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
_INDEXED = {**_LATENT, "index_topk": 3, "index_head_dim": 8, "index_n_heads": 2}
_GEMMA = {
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCABULARY,
    "num_kv_shared_layers": 0,
    "layer_types": ["sliding_attention", "full_attention"],
}

BY_KIND: dict[str, dict[str, Any]] = {
    "axk1": _LATENT,
    "bamba": {**_MAMBA, "attn_layer_indices": [1]},
    "codegen": {"rotary_dim": 4},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "sliding_attention"],
        "rope_parameters": {"sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}},
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 48, "hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v32": _INDEXED,
    "dots1": {"layer_types": ["full_attention", "full_attention"], "n_shared_experts": 1, "n_routed_experts": 4},
    "falcon_h1": {**_MAMBA, "mamba_d_ssm": 64},
    "gemma3n_text": {**_GEMMA, "laurel_rank": 8, "activation_sparsity_pattern": [0.5, 0.0]},
    "gemma4_text": _GEMMA,
    "gemma4_unified_text": _GEMMA,
    "glm_moe_dsa": _INDEXED,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 4},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": {**_MAMBA, "layer_types": ["mamba", "attention"], "shared_intermediate_size": 48},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8, "head_dim": 8, "chunk_size": 8, "n_groups": 1},
    "reformer": {"axial_pos_embds_dim": [16, 16], "axial_pos_shape": [8, 8], "attn_layers": ["local", "local"]},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "num_hidden_layers": 4,
        "n_mamba_heads": 2,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
        "attention_head_dim": 16,
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "hybrid_layer_ids": [1, 3],
        "chunk_size": 8,
        "num_hidden_layers": 4,
        "attention_head_dim": 16,
        "mamba_d_state": 8,
        "mamba_headdim": 8,
        "n_mamba_heads": 8,
        "adapter_rank": 8,
        "use_mem_rope": True,
    },
    "zaya": {"num_experts_per_tok": 1},
}
NEVER: dict[str, tuple[str, ...]] = {
    "mpt": ("attn_pdrop",),
    "xlnet": ("max_position_embeddings",),
    "prophetnet": ("num_hidden_layers",),
    **dict.fromkeys(("zamba", "zamba2"), ("attention_hidden_size",)),
}
"""Sizes that a kind's configuration has and does not take."""


def tiny_model(kind: str) -> nn.Module:
    """Make a model of the kind, all of whose parameters matter: what starts at zero or one gets some noise.

    Raises:
        Exception: whatever the last try at a configuration raised.
    """
    failure: Exception = ValueError(f"{kind} has no configuration")
    for without in WITHOUT:
        try:
            model = _made(_config(kind, (*without, *NEVER.get(kind, ()))))
        except Exception as error:  # whatever a class says of sizes that contradict each other
            failure = error
        else:
            return model
    raise failure


def _config(kind: str, without: tuple[str, ...]) -> PretrainedConfig:
    default = AutoConfig.for_model(kind)
    parts = {
        name: _sizes(part, without)
        for name in getattr(default, "sub_configs", {})
        if isinstance(part := getattr(default, name, None), PretrainedConfig) and kind not in BY_KIND
    }
    return type(default)(**{**_sizes(default, without), **parts, **BY_KIND.get(kind, {})})


def _sizes(config: PretrainedConfig, without: tuple[str, ...]) -> dict[str, Any]:
    return {name: value for name, value in SIZES.items() if name not in without and _has(config, name)}


def _has(config: PretrainedConfig, name: str) -> bool:
    try:
        return hasattr(config, name)
    except ValueError:  # it differs between layers
        return False


def _made(config: PretrainedConfig) -> nn.Module:
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{size:,} parameters are too many")
    torch.manual_seed(0)
    model: nn.Module = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape), alpha=0.1)
        model(input_ids=torch.randint(5, VOCABULARY, (1, 12)), use_cache=False)
    return model

"""The tables that laws run over: models, batches, transforms. Everything is made on the spot."""

from collections.abc import Callable, Iterable
from functools import cache
from typing import NamedTuple

import pytest
import torch
import transformers
from torch import Tensor, nn

import funcattrib as fa
from funcattrib.chain.transform import Transform
from funcattrib.transforms import AdamState

VOCABULARY = 61
_SMALL = {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
_BLOCK = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}
_GROUPED = {**_BLOCK, "num_key_value_heads": 2, "head_dim": 6}


class Causal(NamedTuple):
    """A causal language model of transformers: its class' stem and a tiny configuration."""

    stem: str
    settings: dict


CAUSAL = {
    "gpt_neox": Causal("GPTNeoX", {**_SMALL, **_BLOCK}),
    "gpt2": Causal("GPT2LMHead", {**_SMALL, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "llama": Causal("Llama", {**_SMALL, **_GROUPED}),
    "qwen3": Causal("Qwen3", {**_SMALL, **_GROUPED}),
    "gemma3": Causal(
        "Gemma3", {**_SMALL, **_GROUPED, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
    ),
    "olmo2": Causal("Olmo2", {**_SMALL, **_GROUPED}),
    "gpt_neo": Causal(
        "GPTNeo",
        {
            **_SMALL,
            "hidden_size": 24,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 4,
        },
    ),
    "mamba": Causal(
        "Mamba", {**_SMALL, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "time_step_rank": 4}
    ),
    "mixtral": Causal("Mixtral", {**_SMALL, **_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": Causal(
        "Qwen3Moe",
        {**_SMALL, **_GROUPED, "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 20},
    ),
    "gemma2": Causal("Gemma2", {**_SMALL, **_GROUPED, "sliding_window": 4, "query_pre_attn_scalar": 6}),
    "cohere": Causal("Cohere", {**_SMALL, **_GROUPED, "logit_scale": 0.25}),
}
TIED = "llama_tied"
KINDS = ("gpt_neox", "gpt2", "gemma3", "mamba", "qwen3_moe", TIED)
"""One model of each kind: biases, transposed weights, two kinds of attention, none, experts, a weight used twice."""


def swept(names: Iterable[str]) -> list:
    """Return the models as a test's parameters: those that are of a kind with another are slow."""
    return [pytest.param(name, marks=() if name in KINDS else pytest.mark.slow) for name in names]


EVERY = swept((*CAUSAL, TIED))


@cache
def causal(name: str) -> nn.Module:
    """A float32 causal model with seeded random weights, norms and biases included."""
    case = CAUSAL["llama" if name == TIED else name]
    stem = case.stem
    config_stem = {"Gemma3": "Gemma3Text", "GPT2LMHead": "GPT2"}.get(stem, stem)
    config_class = getattr(transformers, f"{config_stem}Config")
    settings = {**case.settings, "tie_word_embeddings": name == TIED}
    torch.manual_seed(0)
    model_class = getattr(transformers, f"{stem}Model" if stem.endswith("LMHead") else f"{stem}ForCausalLM")
    model = model_class(config_class(**settings))
    with torch.no_grad():  # vectors that start at one or zero would hide mistakes
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def batch(lengths: tuple[int, ...] = (9, 5, 12, 2), masked: bool = True, seed: int = 1) -> dict[str, Tensor]:
    """Mixed lengths, right-padded; with ``masked``, a prompt of a third of each document has no label."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.randint(1, VOCABULARY, (length,), generator=generator)
        labels[row, :length] = ids[row, :length]
        if masked:
            labels[row, : length // 3] = -100
    return {"input_ids": ids, "labels": labels}


class Regressor(nn.Module):
    """A BERT encoder with a regression head on the first token: a model and loss of the user's own."""

    def __init__(self) -> None:
        super().__init__()
        config = transformers.BertConfig(**_SMALL, **_BLOCK)
        self.encoder = transformers.BertModel(config, add_pooling_layer=False)
        self.head = nn.Linear(config.hidden_size, 1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.head(self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state[:, 0])[:, 0]


@cache
def regressor() -> Regressor:
    torch.manual_seed(0)
    return Regressor().eval()


def regression_batch(lengths: tuple[int, ...] = (7, 4, 10)) -> dict[str, Tensor]:
    ids = batch(lengths)["input_ids"]
    mask = torch.arange(ids.shape[1])[None] < torch.tensor(lengths)[:, None]
    return {"input_ids": ids, "attention_mask": mask.long(), "target": torch.linspace(-1, 1, len(lengths))}


HEADS = {
    "matrix": fa.AttentionConfig(3, 3, head_dim=1),
    "layer.dense": fa.AttentionConfig(2, 2, order="qkv head"),
    "out": fa.AttentionConfig(2, 2),
    "vector": fa.AttentionConfig(1, 8),
}
"""For the leaves of ``laws.VECTORS``."""


def inner_products(**settings) -> Transform:
    """Three seeded queries of whatever leaves arrive."""

    def queries(spec: fa.Spec) -> dict[str, Tensor]:
        generators = {name: torch.Generator().manual_seed(len(name)) for name in spec}
        return {name: torch.randn(3, *leaf.shape, generator=generators[name]) for name, leaf in spec.items()}

    return fa.inner_products({}, **settings)._replace(
        init=lambda spec: fa.inner_products(queries(spec), **settings).init(spec)
    )


def adam_update(**settings) -> Transform:
    """Seeded moments of whatever leaves arrive, after two steps."""

    def states(spec: fa.Spec) -> dict[str, AdamState]:
        draws = {name: torch.Generator().manual_seed(len(name)) for name in spec}
        pairs = {name: [torch.randn(leaf.shape, generator=draws[name]) for _ in "mv"] for name, leaf in spec.items()}
        return {name: AdamState(m, v.square(), 2, (0.8, 0.9)) for name, (m, v) in pairs.items()}

    own = fa.adam_update({}, **settings)
    return own._replace(init=lambda spec: fa.adam_update(states(spec), **settings).init(spec))


TRANSFORMS: dict[str, Callable[[], Transform]] = {
    "project": lambda: fa.project(5),
    "project_normal": lambda: fa.project(5, kind="normal", seed=3),
    "project_wide": lambda: fa.project(1000),
    "adafactor_norm": fa.adafactor_norm,
    "adam_norm": fa.adam_norm,
    "adam_update": adam_update,
    "adam_update_project": lambda: adam_update(then=fa.project(3)),
    "split_heads": lambda: fa.split_heads(HEADS),
    "unit_norm": fa.unit_norm,
    "sketch": lambda: fa.sketch(12, seed=1),
    "sketch_sparse": lambda: fa.sketch(12, sparsity=3),
    "split_experts": fa.split_experts,
    "select": lambda: fa.select(["*.weight", "matrix"], exclude=["*dense.weight"]),
    "precondition": lambda: fa.precondition(),
    "precondition_inverse": lambda: fa.precondition(power=-1, damping=0.3, damping_kind="absolute"),
    "precondition_pseudo": lambda: fa.precondition(damping=0.5, damping_kind="pseudoinverse"),
    "precondition_all": lambda: fa.precondition(groups="all"),
    "precondition_groups": lambda: fa.precondition(groups={"layer": ["layer.*"]}),
    "clip": lambda: fa.clip(12.0),
    "cast_float16": lambda: fa.cast("float16"),
    "cast_bfloat16": lambda: fa.cast("bfloat16"),
    "cast_int8": lambda: fa.cast("int8"),
    "inner_products": inner_products,
    "inner_products_by_leaf": lambda: inner_products(by="leaf"),
    "inner_products_unit_norm": lambda: inner_products(unit_norm=True),
    "self_influence": fa.self_influence,
}

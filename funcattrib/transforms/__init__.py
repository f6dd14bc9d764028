"""Transforms of per-example gradients, one family a file."""

from funcattrib.models.attention_config import AttentionConfig
from funcattrib.transforms.adafactor import adafactor_norm
from funcattrib.transforms.adam import adam_norm
from funcattrib.transforms.adam_update import AdamState, adam_update
from funcattrib.transforms.cast import cast
from funcattrib.transforms.clip import clip
from funcattrib.transforms.experts import split_experts
from funcattrib.transforms.heads import split_heads
from funcattrib.transforms.inner_products import inner_products, max_score, self_influence
from funcattrib.transforms.precondition import precondition
from funcattrib.transforms.project import project
from funcattrib.transforms.select import select
from funcattrib.transforms.sketch import sketch
from funcattrib.transforms.unit_norm import unit_norm

__all__ = [
    "AdamState",
    "AttentionConfig",
    "adafactor_norm",
    "adam_norm",
    "adam_update",
    "inner_products",
    "cast",
    "clip",
    "max_score",
    "precondition",
    "project",
    "select",
    "self_influence",
    "sketch",
    "split_experts",
    "split_heads",
    "unit_norm",
]

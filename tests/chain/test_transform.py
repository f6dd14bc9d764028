"""A transform's name and settings, as manifests keep them: the same words in the same order since the first version."""

import json

import pytest
import torch

import funcattrib as fa
from tests.support import cases

HEAD = {"num_heads": 2, "head_size": 2, "head_dim": 0}
PRECONDITION = {"groups": "parameter", "power": -0.5, "damping": 0.1, "damping_kind": "relative"}
DESCRIBED = {
    "project": {"name": "project", "k": 5, "kind": "rademacher", "seed": 0},
    "project_normal": {"name": "project", "k": 5, "kind": "normal", "seed": 3},
    "project_wide": {"name": "project", "k": 1000, "kind": "rademacher", "seed": 0},
    "adafactor_norm": {"name": "adafactor_norm", "eps": 1e-30},
    "adam_norm": {"name": "adam_norm", "eps": 1e-8},
    "adam_update": {"name": "adam_update", "then": None},
    "adam_update_project": {
        "name": "adam_update",
        "then": {"name": "project", "k": 3, "kind": "rademacher", "seed": 0},
    },
    "split_heads": {
        "name": "split_heads",
        "config": {
            "matrix": {"num_heads": 3, "head_size": 3, "head_dim": 1, "order": "head"},
            "layer.dense": {**HEAD, "order": "qkv head"},
            "out": {**HEAD, "order": "head"},
            "vector": {"num_heads": 1, "head_size": 8, "head_dim": 0, "order": "head"},
        },
    },
    "unit_norm": {"name": "unit_norm"},
    "sketch": {"name": "sketch", "k": 12, "seed": 1, "sparsity": 1},
    "sketch_sparse": {"name": "sketch", "k": 12, "seed": 0, "sparsity": 3},
    "split_experts": {"name": "split_experts"},
    "select": {"name": "select", "include": ("*.weight", "matrix"), "exclude": ("*dense.weight",)},
    "precondition": {"name": "precondition", **PRECONDITION},
    "precondition_inverse": {
        "name": "precondition",
        **PRECONDITION,
        "power": -1.0,
        "damping": 0.3,
        "damping_kind": "absolute",
    },
    "precondition_pseudo": {
        "name": "precondition",
        **PRECONDITION,
        "damping": 0.5,
        "damping_kind": "pseudoinverse",
    },
    "precondition_all": {"name": "precondition", **PRECONDITION, "groups": "all"},
    "precondition_groups": {"name": "precondition", **PRECONDITION, "groups": {"layer": ["layer.*"]}},
    "clip": {"name": "clip", "max_norm": 12.0},
    "cast_float16": {"name": "cast", "dtype": "float16"},
    "cast_bfloat16": {"name": "cast", "dtype": "bfloat16"},
    "cast_int8": {"name": "cast", "dtype": "int8"},
    "inner_products": {"name": "inner_products", "by": "example", "unit_norm": False},
    "inner_products_by_leaf": {"name": "inner_products", "by": "leaf", "unit_norm": False},
    "inner_products_unit_norm": {"name": "inner_products", "by": "example", "unit_norm": True},
    "self_influence": {"name": "self_influence"},
    "max_score": {"name": "max_score"},
}
GIVEN = {
    "adafactor_norm": (fa.adafactor_norm, {"moments": {}}),
    "adam_norm": (fa.adam_norm, {"moments": {}}),
    "precondition": (fa.precondition, {"gram": {}}),
}
"""What is given with them is part of the state, and of no manifest."""


@pytest.mark.parametrize("name", [*cases.TRANSFORMS, "max_score"])
def test_describe(name) -> None:
    made = {**cases.TRANSFORMS, "max_score": fa.max_score}[name]()
    (found,) = fa.compose(made).describe()
    assert list(found.items()) == list(DESCRIBED[name].items())
    assert json.loads(json.dumps(found)) == json.loads(json.dumps(DESCRIBED[name]))


@pytest.mark.parametrize("name", GIVEN)
def test_tensors_are_not_settings(name) -> None:
    factory, given = GIVEN[name]
    assert fa.compose(factory(**given)).describe() == [DESCRIBED[name]]


def test_settings_are_described_as_they_are_given() -> None:
    own = fa.Transform("own", settings={"b": 1, "a": torch.pi})
    assert list(own.describe().items()) == [("name", "own"), ("b", 1), ("a", torch.pi)]
    assert fa.Transform("bare").describe() == {"name": "bare"}


def test_a_chain_and_a_model_taken_apart_in_words() -> None:
    chain = fa.compose(fa.per_example_grad, fa.project(4), fa.unit_norm)
    assert repr(chain) == "Chain(per_example_grad → project(k=4, kind='rademacher', seed=0) → unit_norm())"
    assert repr(fa.compose()) == "Chain()"
    parts = fa.functionalize(cases.causal("gpt_neox"))
    assert repr(parts) == "Functional(GPTNeoXForCausalLM: 8 attributed parameters, 22 frozen tensors)"

"""Kinds of causal language models of transformers, made tiny, against a plain loop: a sample of `benchmarks.models`."""

import pytest
import torch

import funcattrib as fa
from benchmarks.models import examples, loop, outcome, padded, relative_error
from benchmarks.tiny_models import KINDS, tiny_model
from funcattrib.chain.evaluation import batched, by_vmap, one_by_one
from funcattrib.errors import ChainError
from funcattrib.lift import TwoSided, readout

SAMPLE = (
    *("bamba", "bert", "big_bird", "codegen", "cohere2", "dbrx", "deepseek_v2", "deepseek_v4", "exaone4", "falcon_h1"),
    *("gemma3n_text", "gemma4_text", "glm4_moe", "gpt_oss", "gptj", "granitemoehybrid", "lfm2_moe", "llama4_text"),
    *("longcat_flash", "mamba2", "modernbert-decoder", "phi3", "qwen3_5_text", "recurrent_gemma", "zamba2"),
)
REFUSED_IN_BATCHES = ("gpt2",)
"""Positions are common to the examples of a batch."""
PATHS = ("bloom", "cpmant", "jetmoe", "xlm")
"""Kinds that vmap refuses, or that see their padding."""


@pytest.mark.parametrize("kind", [*(pytest.param(kind, marks=pytest.mark.slow) for kind in SAMPLE), *PATHS])
def test_rows_are_the_loops(kind: str) -> None:
    assert outcome(kind).rows.startswith("ok"), outcome(kind)


@pytest.mark.parametrize("kind", ["gpt_neox", "llama", pytest.param("qwen3_moe", marks=pytest.mark.slow), "gpt2"])
def test_all_ways_give_the_same_rows(kind: str) -> None:
    model = tiny_model(kind)
    loss, params = fa.causal_lm_loss(model, modules="all")
    maps = {name: readout(name, TwoSided()) for name in params}
    batch = padded(examples())
    expected = loop(model, examples(), list(params))
    ways = (by_vmap, one_by_one) if kind in REFUSED_IN_BATCHES else (by_vmap, batched, one_by_one)
    if kind in REFUSED_IN_BATCHES:
        with pytest.raises(ChainError):
            batched(loss, params, maps, batch)
    for way in ways:
        result = way(loss, params, maps, batch)
        for at, row in enumerate(expected):
            assert relative_error({name: grad[at] for name, grad in result.grads.items()}, row) < 1e-4, way.__name__


def test_the_sample_exists() -> None:
    assert set(SAMPLE) | set(PATHS) <= set(KINDS)
    assert len(SAMPLE) >= 25 - len(PATHS)


def test_documents_of_one_length_are_batched_together(tmp_path) -> None:
    """A model that sees its padding, through a whole build with batches of many documents."""
    model = tiny_model("cpmant")
    data = [{"input_ids": each["input_ids"].tolist(), "labels": each["labels"].tolist()} for each in examples()]
    settings = {"projection_dim": 0, "dtype": "float32", "quiet": True}
    many = fa.collect_gradients(model, data, path=tmp_path / "many", **settings)
    one = fa.collect_gradients(model, data, path=tmp_path / "one", token_batch_size=1, **settings)
    scale = float(one.matrix().tensor().abs().max())
    torch.testing.assert_close(many.matrix().tensor(), one.matrix().tensor(), rtol=0, atol=1e-5 * scale)

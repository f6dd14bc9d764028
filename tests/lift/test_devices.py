"""The same on every device: models, transforms, stores and scores against float64 loops and runs on the CPU.

With a GPU, everything here runs on it as well.
"""

import copy
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

import funcattrib as fa
from funcattrib import testing as laws
from funcattrib.models.functional import parameters_of
from funcattrib.models.loading import load_model
from funcattrib.recipes.trackstar import trackstar
from funcattrib.runs.score import score_gradients
from funcattrib.weights.stored import dense
from tests.models.test_families import loop, worst
from tests.support import cases, tiny
from tests.support.sweeps import crossed

GPU = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))
pytestmark = pytest.mark.parametrize("device", ["cpu", GPU])


def to(device: str, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in batch.items()}


def on_cpu(grads: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: grad.cpu() for name, grad in grads.items()}


def moved(name: str, device: str, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    return copy.deepcopy(cases.causal(name)).to(device, dtype)


@pytest.mark.parametrize(("name", "kind"), crossed((*cases.CAUSAL, cases.TIED), ["ce", "log_odds"]))
def test_every_parameter_against_the_float64_loop(name: str, kind: str, device: str) -> None:
    batch = cases.batch()
    loss, params = fa.causal_lm_loss(moved(name, device), modules="all", kind=kind)
    chain = fa.compose(fa.per_example_grad, fa.select(["*"]))
    found = chain(loss, params, to(device, batch))
    assert all(grad.device.type == device for grad in found.values())
    assert worst(on_cpu(found), loop(cases.causal(name), batch, kind, "sum")) < 3e-5


@pytest.mark.parametrize("name", ["gpt_neox", "llama", "gemma2"])
def test_rows_in_half_precision_are_near_those_in_full(name: str, device: str) -> None:
    chain, rows = fa.compose(fa.per_example_grad, fa.project(8)), {}
    for dtype in (torch.float32, torch.bfloat16):
        loss, params = fa.causal_lm_loss(moved(name, device, dtype))
        grads = chain(loss, params, to(device, cases.batch()))
        rows[dtype] = torch.cat([grad.flatten(1).double().cpu() for grad in grads.values()], 1)
    assert float(torch.cosine_similarity(*rows.values()).min()) > 0.99


def linear(params: dict[str, Tensor], example: dict[str, Tensor]) -> Tensor:
    """A loss whose gradients are the example."""
    return torch.stack([(params[name] * example[name]).sum() for name in params]).sum()


@pytest.mark.parametrize("name", cases.TRANSFORMS)
def test_transforms_fit_and_apply_as_on_the_cpu(name: str, device: str) -> None:
    def run(where: str) -> dict[str, Tensor]:
        spec = laws.KERNELS if name == "split_experts" else laws.VECTORS
        params = {leaf: torch.zeros(of.shape, device=where) for leaf, of in spec.items()}
        chain = fa.compose(fa.per_example_grad, cases.TRANSFORMS[name]())
        batches = [to(where, laws.grads(rows, spec, seed=rows)) for rows in (6, 3)]
        return on_cpu(chain(linear, params, batches[0], chain.fit(linear, params, batches)))

    laws.close(run(device), run("cpu"), 1e-4)


@cache
def data() -> list[dict]:
    lengths = [4, 9, 2, 7, 12, 5, 8, 3]
    ids = cases.batch(tuple(lengths), seed=3)["input_ids"]
    return [{"input_ids": row[:n].tolist()} for row, n in zip(ids, lengths, strict=True)]


SETTINGS = {"projection_dim": 4, "token_batch_size": 32, "rows_per_shard": 3, "dtype": "float32", "quiet": True}


def filled(path: Path, device: str) -> np.ndarray:
    settings = {**SETTINGS, "normalizer": "adafactor", "precondition": "parameter"}
    store = fa.collect_gradients(moved("gpt_neox", device), data(), path=path, **settings)
    asked = fa.Attributor(path, model=moved("gpt_neox", device), device=device, unit_norm=True)
    hits = asked.ask([{"input_ids": data()[4]["input_ids"]}], 1)[0]
    assert hits[0].row == 4
    return np.asarray(store.matrix())


def scored(path: Path, device: str) -> np.ndarray:
    return np.asarray(score_gradients(moved("llama", device), data(), path=path, query_data=data()[:2], **SETTINGS)[:])


def tracked(path: Path, device: str) -> np.ndarray:
    return np.asarray(trackstar(moved("gpt_neox", device), data(), data()[:2], path=path, **SETTINGS)[:])


@pytest.mark.parametrize("run", [filled, scored, tracked])
def test_a_run_is_that_of_the_cpu(run: Callable[[Path, str], np.ndarray], device: str, tmp_path: Path) -> None:
    found, expected = run(tmp_path / "here", device), run(tmp_path / "cpu", "cpu")
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("name", ["gpt_neox", "llama", "qwen3_moe"])
def test_weights_in_codes_give_the_gradients_of_what_they_stand_for(
    name: str, precision: str, device: str, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    folder = tiny.save_model(tmp_path / "model", name)
    model = load_model(str(folder), precision=precision, device=device).model
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        for weight, codes in zip(plain.parameters(), parameters_of(model).values(), strict=True):
            weight.copy_(dense(codes))
    chain = fa.compose(fa.per_example_grad, fa.project(4))
    found = on_cpu(chain(*fa.causal_lm_loss(model), to(device, cases.batch())))
    laws.close(found, chain(*fa.causal_lm_loss(plain), cases.batch()), 1e-3)

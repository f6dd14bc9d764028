"""Models in codes and in shards: rows, codes and fingerprint are those of the unsharded quantised model."""

import json
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

import funcattrib as fa
from funcattrib.models.functional import parameters_of
from funcattrib.models.identity import model_identity
from funcattrib.models.loading import load_model
from funcattrib.models.quantised_loading import Layer, quantised_rows, saved_blocks
from funcattrib.weights.sharded import Gathers, Sharded
from funcattrib.weights.sharded_quantised import QuantFormat, ShardedQuantised
from funcattrib.weights.stored import dense
from tests.support import cases, tiny
from tests.support import sharded_quantised_run as run
from tests.weights.test_quantised import CODES
from tests.weights.test_sharded import CPU, SINGLE_PROCESS, start

pytestmark = pytest.mark.slow

pytest.importorskip("bitsandbytes")


class Rank(NamedTuple):
    """What ``quantised_rows`` asks of the gathers."""

    size: int
    rank: int


class Slice:
    """A weight in a file, of which it is known how much was read."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight, self.read = weight, 0

    def __getitem__(self, key):
        part = self.weight[key]
        self.read += part.numel()
        return part


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    return {size: tmp_path_factory.mktemp(f"of{size}") for size in run.MODELS}


@pytest.fixture(scope="module")
def ranks(folders: dict[int, Path]):
    return cache(lambda size: start(folders[size], size, "tests/support/sharded_quantised_run.py"))


CELLS = [(size, name, precision) for size in run.MODELS for name in run.MODELS[size] for precision in run.PRECISIONS]


@pytest.mark.parametrize(("size", "name", "precision"), CELLS)
def test_rows_codes_and_fingerprint(size: int, name: str, precision: str, ranks) -> None:
    for rank in ranks(size):
        cell = rank[f"{name} {precision}"]
        assert len(cell["rows"]) == 7
        assert max(cell["rows"].values()) <= 1e-6
        assert cell["codes"]


def bytes_of(shape: tuple[int, ...], precision: str) -> tuple[int, int]:
    """Blocks of a weight, and bytes of one: a code and a scale for a row, or half a byte a number and one for 64."""
    rows, columns = shape
    return (rows, columns + 4) if precision == "int8" else (-(-rows * columns // 64), 32 + 4)


@pytest.mark.parametrize(("size", "name", "precision"), CELLS)
def test_a_share_is_held_and_codes_are_gathered_twice(size: int, name: str, precision: str, ranks) -> None:
    model = cases.causal(name)
    weights = dict(model.named_parameters())
    held = [rank[f"{name} {precision}"]["bytes"] for rank in ranks(size)]
    assert len(held[0]) == {"gpt_neox": 8, "gpt2": 8, "qwen3_moe": 8}.get(name, 14)
    gathered = 0
    for leaf in held[0]:
        turned = type(model.get_submodule(leaf.rpartition(".")[0])).__name__ == "Conv1D"
        blocks, width = bytes_of(tuple(weights[leaf].shape)[:: -1 if turned else 1], precision)
        most = -(-blocks // size)
        assert [each[leaf] for each in held] == [
            width * max(0, min(most, blocks - most * rank)) for rank in range(size)
        ]
        gathered += width * most * size
    sizes = {leaf: p.numel() * 4 for leaf, p in weights.items()}
    vectors = sum(size for leaf, size in sizes.items() if weights[leaf].ndim < 2)
    for rank in ranks(size):
        found = rank[f"{name} {precision}"]["traffic"]
        assert found["codes"] == 2 * gathered
        assert found["foreseen"]
        assert 0 < found["alive"] <= sum(sorted(sizes.values())[-2:]) + vectors


@pytest.mark.parametrize("precision", run.PRECISIONS)
def test_offloaded_and_built(precision: str, ranks, folders, funcattrib, tmp_path: Path) -> None:
    for rank in ranks(2):
        assert max(rank[f"offloaded {precision}"].values()) <= 1e-6
        assert rank[f"build {precision}"] == 0
    model, data = (folders[2] / part for part in ("gpt2", "data.jsonl"))
    words = ["build", tmp_path / "whole", "--model", model, "--dataset", data, *run.SIZES, *run.BUILD]
    assert funcattrib(*words, "--precision", precision).code == 0
    sharded, whole = (fa.open_store(path, verify=True) for path in (folders[2] / precision, tmp_path / "whole"))
    assert sharded.manifest.model == whole.manifest.model
    assert sharded.manifest.model["dtype"] == precision
    ours, theirs = sharded.matrix()[:], whole.matrix()[:]
    assert np.abs(ours - theirs).max() <= 1e-6 * np.abs(theirs).max()


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("shape", [(10, 12), (7, 9), (5, 64), (3, 130), (1, 6)])
@pytest.mark.parametrize("kind", ["int8", "nf4", "fp4"])
def test_parts_are_those_of_the_whole_weight(kind: str, shape: tuple[int, int], size: int) -> None:
    """Where rows end inside blocks, blocks inside bytes, and ranks have none; (in, out) in the files as well."""
    from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_quant, quantize_4bit

    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    coding = QuantFormat(kind, shape, torch.float32, shape[1] if kind == "int8" else 64)
    for turned in (False, True):
        parts = []
        for rank in range(size):
            file = Slice(weight.T.contiguous() if turned else weight)
            layer, own = Layer(coding, turned, saved=False), Rank(size, rank)
            parts.append(quantised_rows(layer, file, torch.float32, own, CPU))  # type: ignore[arg-type]
            first, last = coding.numbers(size, rank)
            assert file.read <= last - first + 2 * (shape[1] - 1)  # whole rows are read
        whole = torch.cat(parts)
        assert len(whole) == coding.blocks
        assert len(parts[0]) == -(-coding.blocks // size)
        held = ShardedQuantised(Sharded(whole, tuple(whole.shape), Gathers(None)), coding)
        if kind == "int8":
            codes, scale, _ = int8_vectorwise_quant(weight.half())
            wanted = codes * (scale / 127)[:, None]
        else:
            codes, state = quantize_4bit(weight, blocksize=64, quant_type=kind)
            state.shape = torch.Size([1, weight.numel()])
            wanted = dequantize_4bit(codes, state).reshape(shape)
        assert torch.equal(held.dense(), wanted)


@pytest.mark.parametrize("name", [*cases.CAUSAL, cases.TIED])
def test_a_single_process_holds_all_blocks(name: str, tmp_path: Path) -> None:
    """In half precision, as checkpoints are; the same layers are quantised, the same parameters have the same names."""
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny.save_model(tmp_path / "model", name))
    if name != "qwen3_moe":  # whose experts of 20 numbers torch does not multiply in half precision
        model.to(torch.bfloat16).save_pretrained(tmp_path / "model")
    for precision in run.PRECISIONS:
        settings = {"name": str(tmp_path / "model"), "device": "cpu", "precision": precision}
        same(load_model(**settings, shards=SINGLE_PROCESS).model, load_model(**settings).model)


def same(sharded: torch.nn.Module, whole: torch.nn.Module) -> None:
    ours, theirs = parameters_of(sharded), parameters_of(whole)
    assert list(ours) == list(theirs)
    assert all(torch.equal(dense(ours[name]), dense(tensor)) for name, tensor in theirs.items())
    assert [tensor.dtype for tensor in ours.values()] == [tensor.dtype for tensor in theirs.values()]
    assert model_identity(sharded, "x") == model_identity(whole, "x")
    assert len(run.in_codes(sharded)) > 0
    assert not any(p.requires_grad for p in sharded.parameters())


SAVED = {**CODES, "as_bfloat16": {**CODES["nf4"], "bnb_4bit_quant_storage": torch.bfloat16}}


@pytest.mark.parametrize("codes", SAVED)
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_moe"])
def test_checkpoints_that_are_saved_in_codes(name: str, codes: str, tmp_path: Path) -> None:
    folder, dtype = tiny.save_model(tmp_path / "float", name), torch.float32 if name == "qwen3_moe" else torch.bfloat16
    config = transformers.BitsAndBytesConfig(**SAVED[codes])
    settings = {"quantization_config": config, "dtype": dtype, "device_map": {"": "cpu"}}
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **settings)
    model.save_pretrained(tmp_path / "codes")
    tiny.make_tokenizer().save_pretrained(tmp_path / "codes")
    whole = load_model(str(tmp_path / "codes"), device="cpu", precision="auto").model
    for precision in ("auto", "fp32", "int4"):  # what the files have is taken as it is
        sharded = load_model(str(tmp_path / "codes"), device="cpu", precision=precision, shards=SINGLE_PROCESS).model
        same(sharded, whole)
    files = load_file(tmp_path / "codes" / "model.safetensors")
    for key, held in run.in_codes(sharded).items():
        layer = Layer(held.coding, turned=False, saved=True)
        parts = [saved_blocks(layer, key, files, Rank(3, rank), CPU)[0] for rank in range(3)]  # type: ignore[arg-type]
        assert len(parts[0]) == -(-held.coding.blocks // 3)
        assert torch.equal(torch.cat(parts), held.blocks.rows)


def test_codes_of_another_kind_are_refused(tmp_path: Path) -> None:
    folder = tiny.save_model(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(fa.FuncattribError, match="quantised by bitsandbytes with `shard_params`, found gptq") as caught:
        load_model(str(folder), device="cpu", shards=SINGLE_PROCESS)
    assert str(caught.value).count("\n") == 1

"""Batches that memory does not hold: computed in halves, with the same rows; for real under a limit of the system's."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import funcattrib as fa
from funcattrib.chain.per_example import GradientSource
from funcattrib.runs.error_hints import explained
from funcattrib.runs.oom_retry import Pieces
from funcattrib.runs.reduce import reduce_gradients
from tests.support import cases, tiny
from tests.support.waiting import OUTER_LIMIT

TEXTS = tiny.texts(30)
SMALL = {"projection_dim": 4, "dtype": "float32", "rows_per_shard": 12, "token_batch_size": 160, "quiet": True}
ERRORS = {
    "cuda": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "cpu": RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: …"),
    "driver": RuntimeError("CUDA error: out of memory"),
    "onednn": RuntimeError("could not create a primitive"),
    "python": MemoryError(),
}


class Short:
    """A source that fails above some tokens in a batch, and counts."""

    def __init__(self, most: int, error: Exception, within: GradientSource = fa.per_example_grad) -> None:
        self.most, self.error, self.within = most, error, within
        self.failed: list[tuple[int, ...]] = []
        self.done: list[tuple[int, ...]] = []

    def source(self) -> GradientSource:
        def bind(loss, params, lowered):
            rows = self.within.bind(loss, params, lowered)

            def counted(batch):
                shape = tuple(batch["input_ids"].shape)
                if shape[0] * shape[1] > self.most:
                    self.failed.append(shape)
                    raise self.error
                self.done.append(shape)
                return rows(batch)

            return counted

        return self.within._replace(bind=bind)


def build(path: Path, *stages, source: GradientSource = fa.per_example_grad, recipe=fa.collect_gradients, **settings):
    chain = fa.compose(source, *stages, fa.project(4))
    data = [{"id": f"d{row}", "text": text} for row, text in enumerate(TEXTS)]
    common = {"tokenizer": tiny.make_tokenizer(), "chain": chain, **SMALL, **settings}
    return recipe(cases.causal("llama"), data, path=path, **common)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "did not fit in memory" in record.getMessage()]


@pytest.mark.parametrize("kind", ERRORS)
def test_rows_are_the_same_and_in_their_place(kind, tmp_path, caplog) -> None:
    whole = build(tmp_path / "whole")
    short = Short(50, ERRORS[kind])
    store = build(tmp_path / "short", source=short.source())
    torch.testing.assert_close(store.matrix().tensor(), whole.matrix().tensor(), rtol=1e-4, atol=1e-5)
    assert store.examples["id"][:] == whole.examples["id"][:]
    torch.testing.assert_close(torch.tensor(store.examples["loss"][:]), torch.tensor(whole.examples["loss"][:]))
    assert sum(examples for examples, _ in short.done) == len(TEXTS)
    # 160 tokens fail, and 80; from there on nothing does, in no batch and no shard
    assert len(short.failed) == 2
    assert [examples * longest for examples, longest in short.failed] == sorted(
        (examples * longest for examples, longest in short.failed), reverse=True
    )
    assert len(warnings(caplog)) == 1
    assert fa.store.differences(whole.manifest, store.manifest) == []


def test_fitted_statistics(tmp_path, caplog) -> None:
    stages = (fa.adafactor_norm(),)
    whole = build(tmp_path / "whole", *stages)
    short = Short(50, ERRORS["cpu"])
    store = build(tmp_path / "short", *stages, source=short.source())
    for name, tensor in whole.state().items():
        torch.testing.assert_close(store.state()[name], tensor, rtol=1e-5, atol=1e-12)
    torch.testing.assert_close(store.matrix().tensor(), whole.matrix().tensor(), rtol=1e-4, atol=1e-5)
    assert len(short.failed) == 2  # in the fit; the rows' batches are as small from the start
    assert len(warnings(caplog)) == 1


def test_adam_s_statistics_are_one_tensor_a_piece(tmp_path) -> None:
    whole = build(tmp_path / "whole", fa.adam_norm())
    store = build(tmp_path / "short", fa.adam_norm(), source=Short(50, ERRORS["cpu"]).source())
    for name, tensor in whole.state().items():
        torch.testing.assert_close(store.state()[name], tensor, rtol=1e-5, atol=1e-12)


def test_rows_of_tokens_and_sums(tmp_path, monkeypatch) -> None:
    whole = build(tmp_path / "whole", granularity="token")
    short = Short(50, ERRORS["cuda"], fa.per_token_grad)
    monkeypatch.setattr("funcattrib.runs.token_rows.per_token_grad", short.source())
    store = build(tmp_path / "short", granularity="token")
    assert short.failed
    torch.testing.assert_close(store.matrix().tensor(), whole.matrix().tensor(), rtol=1e-4, atol=1e-5)
    of_all = build(tmp_path / "sum", recipe=reduce_gradients, method="sum")
    of_parts = build(
        tmp_path / "parts", recipe=reduce_gradients, method="sum", source=Short(50, ERRORS["cuda"]).source()
    )
    torch.testing.assert_close(of_parts.matrix().tensor(), of_all.matrix().tensor(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stages", [(), (fa.adafactor_norm(),)], ids=["rows", "fit"])
def test_a_document_that_cannot_fit_names_itself(stages, tmp_path) -> None:
    longest = max(range(len(TEXTS)), key=lambda row: len(TEXTS[row].split()))
    length = len(TEXTS[longest].split())
    short = Short(length - 1, ERRORS["cpu"])
    with pytest.raises(fa.FuncattribError) as raised:
        build(tmp_path / "run", *stages, source=short.source(), rows_per_shard=len(TEXTS))
    said = str(raised.value)
    assert f"one document does not fit in memory: row {longest} (id d{longest}) of {length} tokens" in said
    assert "`truncation` and `max_length`" in said
    assert "`projection_dim`" in said
    assert len(said.splitlines()) == 2


@pytest.mark.parametrize("kind", ERRORS)
def test_where_it_is_not_halved_it_is_explained(kind) -> None:
    with pytest.raises(fa.FuncattribError, match="a batch does not fit in memory"), explained():
        raise ERRORS[kind]


def test_nothing_else_is_caught(tmp_path) -> None:
    short = Short(50, RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"))
    with pytest.raises(RuntimeError, match="must match"):
        build(tmp_path / "run", source=short.source())
    assert len(short.failed) == 1


def test_pieces_of_odd_sizes_come_in_order() -> None:
    pieces = Pieces(str)
    batch = {"x": torch.arange(11)[:, None].expand(11, 7)}

    def compute(part):
        if len(part["x"]) > 2:
            raise MemoryError
        return part["x"][:, 0]

    for _ in range(2):
        found = [*pieces(compute, batch, range(11), torch.device("cpu"))]
        assert torch.equal(torch.cat(found), torch.arange(11))
        assert max(map(len, found)) <= 2
    assert pieces.most == 2 * 7


LIMITED = """
import logging, resource, sys
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM
import funcattrib as fa

logging.basicConfig(level=logging.WARNING, stream=sys.stdout, format="%(message)s")
torch.manual_seed(0)
config = GPTNeoXConfig(
    hidden_size=128, num_hidden_layers=2, num_attention_heads=4, intermediate_size=512, vocab_size=99,
    max_position_embeddings=256, bos_token_id=0, eos_token_id=0,
)
model = GPTNeoXForCausalLM(config).eval()
data = [{"input_ids": [(7 * row + i) % 99 for i in range(256)]} for row in range(64)]


def build(name, budget):
    settings = {"token_batch_size": budget, "projection_dim": 4, "dtype": "float32", "quiet": True}
    return fa.collect_gradients(model, data, path=sys.argv[1] + "/" + name, **settings)


def size():
    line = next(line for line in open("/proc/self/status") if line.startswith("VmSize"))
    return 1024 * int(line.split()[1])


before = build("whole", 1024).matrix().tensor()
print("limited", flush=True)
resource.setrlimit(resource.RLIMIT_AS, (size() + int(sys.argv[2]), resource.RLIM_INFINITY))
after = build("limited", 64 * 256).matrix().tensor()
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print("difference", float((after - before).norm() / before.norm()))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
def test_torch_s_own_allocation_fails(tmp_path) -> None:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}
    words = [sys.executable, "-c", LIMITED, str(tmp_path), str(100 << 20)]
    ran = subprocess.run(words, capture_output=True, text=True, timeout=OUTER_LIMIT, env=env)
    assert ran.returncode == 0, ran.stderr[-2000:]
    lines = ran.stdout.splitlines()
    limited = lines[lines.index("limited") + 1 :]
    assert [line for line in limited if line.startswith("a batch of 64 documents")]
    assert sum("did not fit in memory" in line for line in limited) == 1
    assert float(limited[-1].removeprefix("difference ")) < 1e-5

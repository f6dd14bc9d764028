"""What a run takes, by formula: against chains, counted FLOPs, stores, and the measured runs of this repository."""

import copy
import json
import re
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, GPTNeoXConfig, Wav2Vec2Config

import funcattrib as fa
from benchmarks.inputs import PYTHIA, VOCABULARY, documents
from funcattrib.models.loading import load_model
from funcattrib.models.sharded_loading import Shards
from funcattrib.planning import Machine, Run, estimate, sizes_of
from funcattrib.planning.cost import flops_per_token, gathered_bytes, row_bytes, row_width, weight_bytes
from funcattrib.runtime import memory
from funcattrib.weights.sharded import Gathers
from tests.support import cases, tiny

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def pythia(size: str) -> GPTNeoXConfig:
    hidden, layers, heads, inner = PYTHIA[size]
    return GPTNeoXConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=inner,
        vocab_size=VOCABULARY,
    )


# Sizes and rows


@pytest.mark.parametrize("name", cases.swept(cases.CAUSAL))
def test_a_row_is_as_wide_as_the_chain_makes_it(name) -> None:
    model = cases.causal(name)
    sizes = sizes_of(model.config)
    assert sizes.parameters == sum(tensor.numel() for tensor in model.parameters())
    spec = fa.per_example_grad.spec(fa.causal_lm_loss(model)[1])
    for k in (0, 4, 16):
        stages = [fa.project(k)] if k else []
        widths = [torch.Size(leaf.shape).numel() for leaf in fa.compose(*stages).init(spec)[1].values()]
        assert row_width(sizes.matrices, k) == sum(widths)


def test_chosen_matrices() -> None:
    sizes = sizes_of(pythia("14m"), ["*.mlp.*weight"], ["*.5.*"])
    assert [m.name for m in sizes.matrices if m.attributed] == [
        f"gpt_neox.layers.{layer}.mlp.{side}.weight"
        for layer in range(5)
        for side in ("dense_h_to_4h", "dense_4h_to_h")
    ]
    assert len(sizes.matrices) == 24  # the others are computed all the same
    with pytest.raises(fa.FuncattribError, match="no parameter's name matches"):
        sizes_of(pythia("14m"), ["no.such"])


def test_a_token_passes_through_some_of_the_experts() -> None:
    sizes = sizes_of(cases.causal("mixtral").config)
    stacks = [m for m in sizes.matrices if m.copies > 1]
    assert {(m.copies, m.active) for m in stacks} == {(4, 2)}
    assert flops_per_token(sizes, 1, 4).blocks == 4 * sum(m.rows * m.columns * m.active for m in sizes.matrices)


def test_no_causal_language_model() -> None:
    with pytest.raises(fa.FuncattribError, match="found Wav2Vec2Config"):
        sizes_of(Wav2Vec2Config())
    assert sizes_of(BertConfig(num_hidden_layers=1, is_decoder=True)).layers == 1


# FLOPs


@pytest.mark.parametrize("name", ["gpt_neox", "gpt2", "llama", "qwen3"])
def test_flops_are_those_that_torch_counts(name) -> None:
    """Forward, and backward to the embeddings alone; eager attention multiplies the whole square."""
    model, length = copy.deepcopy(cases.causal(name)), 32
    weights = {name: tensor.detach() for name, tensor in model.named_parameters()}
    embedded = model.get_input_embeddings()(torch.arange(length)[None]).detach().requires_grad_()
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        out = torch.func.functional_call(model, weights, (), {"inputs_embeds": embedded, "use_cache": False}).logits
        out.sum().backward()
    found = flops_per_token(sizes_of(model.config), length, 0)
    square = 12 * length * 24 * 2  # four products backward, two forward, of 2 T HD in each of two layers
    # torch counts rotary embeddings' outer products too: positions × frequencies, once a forward
    assert counter.get_total_flops() / length == pytest.approx(found.blocks + found.head + square, rel=0.01)
    assert found.attention == square * 7 / 12


READING = [(0, 2 * 40 * 24), (4, 2 * (4 * 40 + 4 * 24 + 16)), (32, 2 * (32 * 40 + 32 * 24))]


@pytest.mark.parametrize(("k", "expected"), READING)
def test_flops_of_reading(k, expected) -> None:
    sizes = sizes_of(cases.causal("gpt_neox").config, ["*.0.mlp.dense_h_to_4h.weight"])  # (40, 24)
    assert flops_per_token(sizes, 8, k).readout == expected


# Storage


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
def test_bytes_on_the_disk(dtype, tmp_path) -> None:
    model, texts = cases.causal("llama"), tiny.texts(30)
    settings = {"tokenizer": tiny.make_tokenizer(), "projection_dim": 4, "rows_per_shard": 10, "quiet": True}
    fa.collect_gradients(model, [{"text": text} for text in texts], path=tmp_path, dtype=dtype, **settings)
    files = [*(tmp_path / "shards").glob("*.npy")]
    found = sum(file.stat().st_size - 128 for file in files)  # numpy's header
    tokens = sum(len(text.split()) for text in texts)
    planned = estimate(sizes_of(model.config), Run(tokens, tokens / 30, k=4, dtype=dtype), Machine(speed=1))
    assert found == pytest.approx(planned.stored, rel=1e-12)
    assert found == 30 * row_bytes(planned.width, dtype)


# Time


def figures(page: Path) -> dict[str, str]:
    return dict(re.findall(r"^\| ([^|]+?) \| ([^|]+?) \|$", page.read_text(), re.MULTILINE))


MEASURED = [
    (size, page)
    for size in PYTHIA
    for page in sorted(RESULTS.glob(f"*-build-{size}*.md"))
    if "matrix product FLOP/s (median)" in figures(page)
]


def test_both_sizes_were_measured() -> None:
    assert {"14m", "70m"} <= {size for size, _ in MEASURED}


@pytest.mark.parametrize(("size", "page"), MEASURED, ids=lambda value: getattr(value, "stem", value))
def test_time_is_that_of_the_measured_builds_within_30_percent(size, page) -> None:
    found = figures(page)
    lengths = [len(document["input_ids"]) for document in documents(int(found["documents"]))]
    assert sum(lengths) == int(found["tokens"])
    mean = sum(length**2 for length in lengths) / sum(lengths)  # of the tokens: what attention sees
    machine = Machine(flops=float(found["matrix product FLOP/s (median)"]), device="cpu")
    planned = estimate(sizes_of(pythia(size)), Run(sum(lengths), mean), machine)
    assert sum(lengths) / planned.compute == pytest.approx(float(found["step tokens/s (median)"]), rel=0.3)


def test_what_bounds_a_run() -> None:
    sizes = sizes_of(pythia("1b"))
    machine = Machine(devices=8, flops=1e14, link=1e9, disk=1e12)
    run = Run(tokens=1e9, shards=8)
    found = estimate(sizes, run, machine)
    assert found.bottleneck == "gather"
    assert found.seconds == found.gather
    received = gathered_bytes(sizes, "bf16", 8)
    assert received == 2 * 7 / 8 * (2 * sizes.body + (sizes.parameters - sizes.body))
    assert found.gather == pytest.approx(1e9 / 8 / 4096 * received / 1e9)
    at_once = estimate(sizes, run._replace(batch=round(found.enough)), machine)
    assert at_once.gather == pytest.approx(at_once.compute, rel=1e-3)
    assert estimate(sizes, run._replace(shards=1), machine).gather == 0
    slow = estimate(sizes, run._replace(shards=1, k=0), machine._replace(disk=1e6))
    assert (slow.bottleneck, slow.width) == ("write", sizes.body)
    assert slow.write == pytest.approx(1e9 / 512 * (2 * sizes.body + 512 * 4.5) / 1e6)
    assert estimate(sizes, run, machine._replace(speed=100.0)).compute == 1e9 / 800


# Memory


def test_weights_by_precision() -> None:
    sizes = sizes_of(pythia("70m"))
    other = sizes.parameters - sizes.body
    assert weight_bytes(sizes, "fp32") == 4 * sizes.parameters
    assert weight_bytes(sizes, "bf16") == 2 * sizes.parameters
    assert weight_bytes(sizes, "int8") == sizes.body + 2 * other
    assert weight_bytes(sizes, "int4") == 0.5625 * sizes.body + 2 * other
    machine = Machine(devices=8, flops=1e14)
    whole, divided = (estimate(sizes, Run(1e9, shards=shards), machine).memory for shards in (1, 8))
    assert divided.weights == whole.weights / 8
    assert divided.working >= 2 * 2 * sizes.body / sizes.layers
    assert divided.activations == whole.activations


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_bytes_of_codes_in_shards(name, tmp_path) -> None:
    """Held by one process: experts are not quantised. For a batch, the codes of the blocks are gathered twice."""
    pytest.importorskip("bitsandbytes")
    config = {**cases.causal(name).config.to_dict(), "hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    model = type(cases.causal(name))(type(cases.causal(name).config).from_dict(config)).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    sizes, shards = sizes_of(model.config), Shards(Gathers(None), torch.device("cpu"))
    for precision, left_out in (("int8", 0.06), ("int4", 0.005)):  # int8's scales, 4 bytes a row; a router's codes
        loaded = load_model(str(tmp_path), device="cpu", precision=precision, shards=shards).model
        storages = [tensor.held for tensor in loaded.parameters()]
        held = sum(getattr(storage, "blocks", storage).rows.nbytes for storage in storages)
        assert held == pytest.approx(weight_bytes(sizes, precision), rel=left_out)
        planned = estimate(sizes, Run(1e9, precision=precision, shards=4), Machine(4, 1e14))
        assert planned.memory.weights == weight_bytes(sizes, precision) / 4
        outside = 2 * (sizes.parameters - sizes.body)
        assert gathered_bytes(sizes, precision, 4) == 3 / 4 * (2 * (weight_bytes(sizes, precision) - outside) + outside)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_activations_are_those_that_a_step_takes(name) -> None:
    """A step on a model wide enough to be seen in the memory of the process, twice; what a token adds."""
    config = cases.causal(name).config.to_dict()
    wide = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "head_dim": 64}
    model = type(cases.causal(name))(type(cases.causal(name).config).from_dict({**config, **wide})).eval()
    loss, params = fa.causal_lm_loss(model)
    compute = fa.compose(fa.per_example_grad, fa.project(4)).bind(loss, params)
    cpu, peaks = torch.device("cpu"), []
    for examples in (32, 32, 128):  # the first time to warm up
        ids = torch.randint(1, cases.VOCABULARY, (examples, 64))
        memory.release(cpu)
        before = memory.in_use(cpu)
        compute({"input_ids": ids, "labels": ids})
        peaks.append(memory.peak(cpu) - before)
    a_token = (peaks[2] - peaks[1]) / (96 * 64)
    run = Run(1e6, 64, 4, precision="fp32", batch=4096)
    planned = estimate(sizes_of(model.config), run, Machine(speed=1, device="cpu")).memory
    assert planned.activations / 4096 == pytest.approx(a_token, rel=0.3)


def test_memory_is_that_of_the_measured_builds_within_30_percent() -> None:
    """Whole processes, their largest, as the comparison of programs has them."""
    page = (RESULTS / "2026-11-23-build-bergson.md").read_text()
    peaks = dict(re.findall(r"^\| (14m|70m) \| funcattrib \|.*\| ([\d.]+) \|$", page, re.MULTILINE))
    peaks["70m"] = re.search(r"funcattrib 75\.1 s, CPU 136 s, peak ([\d.]+) GiB", page)[
        1
    ]  # since freed memory goes back
    for size in ("14m", "70m"):
        run = Run(94283, 94283 / 256, precision="fp32", batch=2048)
        planned = estimate(sizes_of(pythia(size)), run, Machine(speed=1, device="cpu")).memory
        assert planned.all / 2**30 == pytest.approx(float(peaks[size]), rel=0.3), size


# The command


def test_the_command_needs_a_configuration_alone(funcattrib, tmp_path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**pythia("70m").to_dict(), "model_type": "gpt_neox"}))
    words = ("plan", "--model", tmp_path, "--tokens", "1e9", "--devices", 8)
    ran = funcattrib(*words, "--device-flops", "4e14")
    assert ran.code == 0, ran.err
    assert "70.4 M parameters, 18.9 M of them attributed, in 24 weights" in ran.out
    assert "storage     24 GB: 1,953,125 rows of 6,144 numbers in float16, 12.3 KB each" in ran.out
    assert "  compute   85" in ran.out
    assert "gather" not in ran.out
    assert (
        funcattrib(*words, "--tokens-per-second", 1e6).out.splitlines()[2] == "time        2.08 minutes, 8 M tokens/s"
    )
    sharded = funcattrib(*words, "--device-flops", "4e14", "--shard-params", "--shard-ranks", 4)
    assert "right: --shard-params over 4" in sharded.out
    assert "  gather    " in sharded.out
    assert not ran.err
    long = funcattrib(*words, "--device-flops", "4e14", "--mean-length", 4000)
    assert long.code == 0
    assert "--mean-length 4000 is longer than the model's context of 2,048 tokens" in long.err
    for wrong, said in (
        ((), "--device-flops or --tokens-per-second is required"),
        (
            ("--device-flops", 1e14, "--tokens-per-second", 3),
            "--device-flops and --tokens-per-second cannot be combined",
        ),
        (("--device-flops", 1e14, "--utilisation", 0), "--utilisation above 0"),
        (("--device-flops", 1e14, "--shard-params", "--shard-ranks", 3), "--shard-ranks to divide 8 devices, found 3"),
        (("--device-flops", 1e14, "--shard-ranks", 4), "--shard-ranks requires --shard-params"),
        (("--device-flops", 1e14, "--mean-length", 1e30), "at least --mean-length 1e+30, found"),
    ):
        ran = funcattrib(*words, *wrong)
        assert (ran.code, said in ran.err) == (2, True), ran.err
    ran = funcattrib("plan", "--model", tmp_path / "nothing", "--tokens", 1, "--device-flops", 1)
    assert ran.code == 2

"""Models in bitsandbytes' codes: gradients equal those of the same model with its dequantised, dense weights."""

import copy
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

import funcattrib as fa
from funcattrib import testing as laws
from funcattrib.models.functional import parameters_of
from funcattrib.models.identity import model_identity
from funcattrib.models.loading import load_model
from funcattrib.weights.stored import Stored, dense
from tests.support import cases, tiny

pytest.importorskip("bitsandbytes")

CODES = {
    "int8": {"load_in_8bit": True},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nested": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
}
OTHERS = ("split_heads", "split_experts", "precondition_groups")  # for leaves that this model does not have
MODELS = ["gpt_neox", "gpt2", "llama", "qwen3_moe", cases.TIED]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory):
    root = tmp_path_factory.mktemp("models")
    return cache(lambda name: tiny.save_model(root / name, name))


def load(folder: Path, codes: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    config = transformers.BitsAndBytesConfig(**CODES[codes], bnb_4bit_compute_dtype=dtype)
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=dtype, device_map={"": "cpu"}
    )


def dequantised(model: nn.Module, folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model as it loads without codes, with the weights that the codes stand for, read here by their definition."""
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            prefix, _, last = name.rpartition(".")
            weight = by_definition(model.get_submodule(prefix), own[name]) if last == "weight" else own[name]
            lies_across = last == "weight" and type(plain.get_submodule(prefix)).__name__ == "Conv1D"
            parameter.copy_(weight.T if lies_across else weight)
    return plain


def by_definition(module: nn.Module, weight: torch.Tensor) -> torch.Tensor:
    if type(weight).__name__ == "Int8Params":
        scale = module.state.SCB if weight.SCB is None else weight.SCB
        return weight.data.double() * scale.double()[:, None] / 127
    if type(weight).__name__ != "Params4bit":
        return weight
    state = weight.quant_state
    scale = state.absmax
    if state.nested:
        coarse = state.state2.absmax.repeat_interleave(state.state2.blocksize)[: len(scale)]
        scale = state.state2.code[scale.long()] * coarse + state.offset
    codes = weight.data.flatten()
    codes = torch.stack([codes >> 4, codes & 15], 1).flatten()[: state.shape.numel()]
    return (state.code[codes.long()] * scale.repeat_interleave(state.blocksize)[: len(codes)]).reshape(state.shape)


def rows(model: nn.Module, *stages: object) -> dict[str, torch.Tensor]:
    loss, params = fa.causal_lm_loss(model)
    batches = [cases.batch((9, 5)), cases.batch((12, 2), seed=2)]
    chain = fa.compose(fa.per_example_grad, *stages)
    return chain(loss, params, cases.batch(), chain.fit(loss, params, batches))


@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("name", MODELS)
def test_models(name: str, codes: str, folder) -> None:
    model = load(folder(name), codes)
    before = tiny.state_bytes(model)
    stored = [n for n, tensor in parameters_of(model).items() if isinstance(tensor, Stored)]
    assert len(stored) == {"gpt_neox": 8, "gpt2": 8, "qwen3_moe": 8}.get(name, 14)
    plain = dequantised(model, folder(name))
    ours, theirs = rows(model, fa.project(1000)), rows(plain, fa.project(1000))
    for leaf, grad in theirs.items():
        assert grad.abs().max() > 0
        wanted = grad.mT if name == "gpt2" else grad  # codes of a Conv1D lie (O, I)
        torch.testing.assert_close(ours[leaf], wanted, rtol=1e-4, atol=1e-5 * float(grad.abs().max()))
    assert all(torch.equal(before[n], tensor) for n, tensor in model.state_dict().items())
    assert {type(module).__name__ for module in model.modules()} & {"Linear8bitLt", "Linear4bit"}


@pytest.mark.parametrize("codes", ["int8", "nf4"])
@pytest.mark.parametrize("transform", [name for name in cases.TRANSFORMS if name not in OTHERS])
def test_transforms(transform: str, codes: str, folder) -> None:
    model = load(folder("llama"), codes)
    plain = dequantised(model, folder("llama"))
    loose = {"cast_float16": 2e-3, "cast_bfloat16": 1e-2, "cast_int8": 1e-2}
    before = [fa.project(3)] if transform.startswith("precondition") else []  # a Gram matrix of whole weights is large
    ours, theirs = (rows(each, *before, cases.TRANSFORMS[transform]()) for each in (model, plain))
    laws.close(as_floats(ours), as_floats(theirs), loose.get(transform, 2e-4))


def as_floats(grads: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: grad.float() for name, grad in grads.items()}


@pytest.mark.parametrize("codes", ["int8", "nf4"])
def test_heads_tokens_and_the_plain_form(codes: str, folder) -> None:
    model = load(folder("llama"), codes)
    plain = dequantised(model, folder("llama"))
    heads = fa.split_heads(fa.attention_configs(model))
    laws.close(rows(model, heads, fa.project(3)), rows(plain, heads, fa.project(3)), 1e-5)
    (loss, params), (other, dense_params) = fa.causal_lm_loss(model), fa.causal_lm_loss(plain)
    batch = cases.batch()
    for source in (fa.per_example_grad, fa.per_token_grad):
        laws.close(source(loss, params, batch), source(other, dense_params, batch), 1e-5)


def test_in_bfloat16_and_after_a_forward_pass_of_its_own(folder) -> None:
    """bitsandbytes' own forward moves and packs the codes; rows stay, and packed codes are read."""
    for codes in ("int8", "nf4"):
        model = load(folder("llama"), codes, torch.bfloat16)
        loss, params = fa.causal_lm_loss(model)
        chain = fa.compose(fa.per_example_grad, fa.project(4))
        first = chain(loss, params, cases.batch())
        laws.close(first, rows(dequantised(model, folder("llama"), torch.bfloat16), fa.project(4)), 2e-2)
        model(input_ids=cases.batch()["input_ids"])
        again = chain(loss, params, cases.batch())
        assert all(torch.equal(first[name], again[name]) for name in first)
        laws.close(first, chain(*fa.causal_lm_loss(model), cases.batch()), 2e-2)


def test_packed_codes() -> None:
    """The layout that bitsandbytes gives codes on processors with AVX512-BF16."""
    from bitsandbytes.functional import _convert_weight_packed_for_cpu as packed
    from bitsandbytes.nn import Linear4bit, Params4bit

    torch.manual_seed(0)
    layer = Linear4bit(64, 96, quant_type="nf4")
    layer.weight = Params4bit(torch.randn(96, 64), quant_type="nf4").to("cpu")
    holder = nn.ModuleList([layer])
    before = dense(parameters_of(holder)["0.weight"])
    layer.weight.data, layer.weight.quant_state = packed(layer.weight.data, copy.copy(layer.weight.quant_state))
    torch.testing.assert_close(dense(parameters_of(holder)["0.weight"]), before, rtol=2**-8, atol=0)


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_loaded_by_name(precision: str, folder, funcattrib, tmp_path: Path) -> None:
    loaded = load_model(str(folder("gpt_neox")), precision=precision, device="cpu")
    kinds = {type(module).__name__ for module in loaded.model.modules()}
    assert {"int8": "Linear8bitLt", "int4": "Linear4bit"}[precision] in kinds
    data = tiny.write_jsonl(tmp_path / "data.jsonl", [{"text": text} for text in tiny.texts(7)])
    words = ["build", tmp_path / "run", "--model", folder("gpt_neox"), "--dataset", data, "--precision", precision]
    assert funcattrib(*words, "--projection-dim", 4, "--device", "cpu").code == 0
    store = fa.open_store(tmp_path / "run")
    assert store.manifest.model["dtype"] == precision
    direct = fa.collect_gradients(
        dequantised(loaded.model, folder("gpt_neox")),
        str(data),
        path=tmp_path / "dense",
        tokenizer=loaded.tokenizer,
        projection_dim=4,
        quiet=True,
    )
    assert store.manifest.model["fingerprint"] != model_identity(cases.causal("gpt_neox"))["fingerprint"]
    torch.testing.assert_close(
        torch.tensor(store.matrix()[:]).float(), torch.tensor(direct.matrix()[:]).float(), rtol=2e-3, atol=2e-3
    )
    found = funcattrib("query", "--index", tmp_path / "run", "--model", folder("gpt_neox"), "--text", "w3 w4 w5")
    assert found.code == 0, found.err

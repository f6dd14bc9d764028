"""PEFT adapters: attributed by themselves, on a base that is whole, quantised or in shards."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch

import funcattrib as fa
from funcattrib import testing as laws
from funcattrib.models.identity import model_identity
from funcattrib.models.loading import load_model
from funcattrib.models.selection import choose
from funcattrib.models.sharded_loading import Shards
from funcattrib.weights.sharded import Gathers, Sharded
from funcattrib.weights.sharded_quantised import ShardedQuantised
from funcattrib.weights.stored import Stored
from tests.models.test_families import loop, worst
from tests.support import cases, tiny

peft = pytest.importorskip("peft")
KINDS = {
    "lora": lambda: peft.LoraConfig(r=3, target_modules=["q_proj", "down_proj"], init_lora_weights=False),
    "dora": lambda: peft.LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights=False, use_dora=True),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("models") / "llama", "llama")


def save_adapter(folder: Path, base: Path, kind: str = "lora") -> Path:
    torch.manual_seed(1)
    model = peft.get_peft_model(copy.deepcopy(cases.causal("llama")), KINDS[kind]())
    for config in model.peft_config.values():
        config.base_model_name_or_path = str(base)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_its_matrices_against_the_float64_loop(kind: str, tmp_path: Path, base: Path) -> None:
    adapter = save_adapter(tmp_path / "adapter", base, kind)
    loaded = load_model(str(adapter), device="cpu")
    assert loaded.name == str(adapter.resolve())
    assert loaded.tokenizer("w3 w4")["input_ids"] == tiny.make_tokenizer()("w3 w4")["input_ids"]
    loss, params = fa.causal_lm_loss(loaded.model)
    assert len(params) == {"lora": 8, "dora": 4}[kind]
    assert all(".lora_" in name and tensor.ndim == 2 for name, tensor in params.items())
    batch = cases.batch()
    model = copy.deepcopy(loaded.model).requires_grad_(True)
    assert (
        worst(fa.compose(fa.per_example_grad, fa.select("*"))(loss, params, batch), loop(model, batch, "ce", "sum"))
        < 1e-5
    )


def test_other_parameters_by_name(tmp_path: Path, base: Path) -> None:
    model = load_model(str(save_adapter(tmp_path / "adapter", base)), device="cpu").model
    assert choose(model, ["*.q_proj.base_layer.weight"]) == {
        f"base_model.model.model.layers.{i}.self_attn.q_proj.base_layer.weight" for i in (0, 1)
    }


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_on_a_quantised_base(precision: str, tmp_path: Path, base: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from tests.weights.test_quantised import by_definition

    adapter = save_adapter(tmp_path / "adapter", base)
    model, whole = (load_model(str(adapter), device="cpu", precision=p).model for p in (precision, "fp32"))
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in whole.named_parameters():
            module = model.get_submodule(name.rpartition(".")[0])
            parameter.copy_(by_definition(module, own[name]) if name.endswith("weight") else own[name])
    batch, chain = cases.batch(), fa.compose(fa.per_example_grad, fa.project(4))
    (loss, params), (dense_loss, dense_params) = fa.causal_lm_loss(model), fa.causal_lm_loss(whole)
    stored = [name for name, tensor in loss.model.parts.frozen.items() if isinstance(tensor, Stored)]
    assert len(stored) == 14
    laws.close(chain(loss, params, batch), chain(dense_loss, dense_params, batch), 1e-5)
    kl, params = fa.causal_lm_loss(model, kind="kl")  # against the quantised base itself
    dense_kl, dense_params = fa.causal_lm_loss(whole, kind="kl")
    laws.close(chain(kl, params, batch), chain(dense_kl, dense_params, batch), 1e-4)


def test_on_a_base_in_shards(tmp_path: Path, base: Path) -> None:
    adapter = save_adapter(tmp_path / "adapter", base)
    shards = Shards(Gathers(None), torch.device("cpu"))
    model, whole = (load_model(str(adapter), device="cpu", shards=s).model for s in (shards, None))
    assert sum(isinstance(parameter, Stored) for parameter in model.parameters()) == 21
    batch, chain = cases.batch(), fa.compose(fa.per_example_grad, fa.project(4))
    laws.close(chain(*fa.causal_lm_loss(model), batch), chain(*fa.causal_lm_loss(whole), batch), 1e-6)


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_on_a_quantised_base_in_shards(precision: str, tmp_path: Path, base: Path) -> None:
    pytest.importorskip("bitsandbytes")
    adapter = save_adapter(tmp_path / "adapter", base)
    shards = Shards(Gathers(None), torch.device("cpu"))
    model, whole = (load_model(str(adapter), device="cpu", precision=precision, shards=s).model for s in (shards, None))
    held = [type(parameter.held) for parameter in model.parameters() if isinstance(parameter, Stored)]
    assert (held.count(ShardedQuantised), held.count(Sharded)) == (14, 7)
    batch, chain = cases.batch(), fa.compose(fa.per_example_grad, fa.project(4))
    for kind in ("ce", "kl"):
        ours, theirs = fa.causal_lm_loss(model, kind=kind), fa.causal_lm_loss(whole, kind=kind)
        assert list(ours[1]) == list(theirs[1])
        laws.close(chain(*ours, batch), chain(*theirs, batch), 1e-6)
    assert model_identity(model, "x") == model_identity(whole, "x")


def test_the_command_line(tmp_path: Path, base: Path, funcattrib) -> None:
    adapter = save_adapter(tmp_path / "adapter", base)
    data = tiny.write_jsonl(tmp_path / "data.jsonl", [{"text": text} for text in tiny.texts(5)])
    words = ["--model", adapter, "--device", "cpu"]
    built = funcattrib("build", tmp_path / "run", *words, "--dataset", data, "--projection-dim", 4)
    assert built.code == 0, built.err
    store = fa.open_store(tmp_path / "run")
    assert store.manifest.model["id"] == str(adapter.resolve())
    assert all(".lora_" in name for name in store.leaves)
    found = funcattrib("query", "--index", tmp_path / "run", *words, "--text", "w3 w4 w5")
    assert found.code == 0, found.err


def test_refused(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = save_adapter(tmp_path / "adapter", base)
    settings = json.loads((adapter / "adapter_config.json").read_text())

    def changed(name: str, **changes: object) -> str:
        folder = tmp_path / name
        shutil.copytree(adapter, folder)
        (folder / "adapter_config.json").write_text(json.dumps({**settings, **changes}))
        return str(folder)

    def refused(name: str, message: str) -> None:
        with pytest.raises(fa.FuncattribError, match=message) as caught:
            load_model(name, device="cpu")
        assert str(caught.value).count("\n") <= 1

    refused(changed("nameless", base_model_name_or_path=None), "adapter_config.json does not name its base model")
    refused(
        changed("gone", base_model_name_or_path=str(tmp_path / "nowhere")), "the model folder .*nowhere does not exist"
    )
    prompts = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3, "task_type": "CAUSAL_LM"}
    refused(changed("prompts", **prompts), "expected an adapter of weights .* found PROMPT_TUNING")
    pickled = changed("pickled")
    (Path(pickled) / "adapter_model.safetensors").unlink()
    refused(pickled, "has no adapter_model.safetensors")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refused(str(adapter), "requires peft, which is not installed")


@pytest.mark.parametrize("config", ["{", "[]", '{"base_model_name_or_path": 3}', '{"base_model_name_or_path": ""}'])
def test_an_adapter_whose_base_is_no_name(config: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(config)
    with pytest.raises(fa.FuncattribError, match=r"adapter_config\.json (is damaged|does not name its base model)"):
        load_model(str(tmp_path), device="cpu")

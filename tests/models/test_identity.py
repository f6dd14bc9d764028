"""The same model? What makes two models different, what does not, and what of it is kept for the next run."""

import copy
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import funcattrib as fa
from funcattrib.models import identity as identities
from funcattrib.models.identity import model_identity
from funcattrib.models.loading import load_model
from funcattrib.store import GradientStore
from tests.models.test_adapter import save_adapter
from tests.support import cases, tiny

TEXTS = [{"text": text} for text in tiny.texts(6)]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "funcattrib" / "weights.json"


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the number of weights whenever a model's weights are read."""
    sizes: list[int] = []
    original = identities.hash_tensors
    monkeypatch.setattr(identities, "hash_tensors", lambda t: sizes.append(len(t)) or original(t))
    return sizes


def content(model: nn.Module) -> str:
    return model_identity(model)["content"]


def one_value(model: nn.Module) -> None:
    with torch.no_grad():
        model.get_input_embeddings().weight.view(-1)[1001] += 1


def past_autograd(model: nn.Module) -> None:
    model.get_input_embeddings().weight.data[3] += 1


DIFFERENT: dict[str, Callable[[nn.Module], object]] = {
    "one value": one_value,
    "a row, past autograd": past_autograd,
    "rope": lambda model: model.config.rope_parameters.update(rope_theta=37.0),
    "eps": lambda model: setattr(model.config, "rms_norm_eps", 0.5),
    "a persistent buffer": lambda model: model.register_buffer("added", torch.ones(2)),
}
SAME: dict[str, Callable[[nn.Module], object]] = {
    "its name": lambda model: setattr(model.config, "_name_or_path", "elsewhere"),
    "its attention": lambda model: model.set_attn_implementation("eager"),
    "its cache": lambda model: setattr(model.config, "use_cache", False),
    "training": lambda model: model.train(),
    "what it returns": lambda model: setattr(model.config, "output_hidden_states", True),
}


@pytest.mark.parametrize("change", DIFFERENT)
def test_another_model(change: str) -> None:
    model = copy.deepcopy(cases.causal("llama"))
    DIFFERENT[change](model)
    assert content(model) != content(cases.causal("llama"))


@pytest.mark.parametrize("change", SAME)
def test_the_same_model(change: str) -> None:
    model = copy.deepcopy(cases.causal("llama"))
    SAME[change](model)
    assert content(model) == content(cases.causal("llama"))


@pytest.mark.parametrize("name", cases.EVERY)
def test_a_saved_model_is_the_one_in_memory(name: str, tmp_path: Path) -> None:
    folder = tiny.save_model(tmp_path / "model", name)
    loaded = load_model(str(folder), device="cpu")
    assert content(loaded.model) == content(cases.causal(name))


def test_a_module_without_a_configuration() -> None:
    def net(slope: float) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(2, 3), nn.LeakyReLU(slope), nn.BatchNorm1d(3))

    assert content(net(0.1)) == content(net(0.1))
    assert content(net(0.1)) != content(net(0.2))
    moved = net(0.1)
    moved[2].running_mean += 1
    assert content(moved) != content(net(0.1))


def test_an_adapter_and_its_settings(tmp_path: Path) -> None:
    base = tiny.save_model(tmp_path / "base", "llama")
    adapter = save_adapter(tmp_path / "adapter", base)
    loaded = load_model(str(adapter), device="cpu").model
    whole = content(loaded)
    shutil.copytree(base, tmp_path / "moved")
    assert content(load_model(str(save_adapter(tmp_path / "again", tmp_path / "moved")), device="cpu").model) == whole
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, "lora_alpha": 3}))
    assert content(load_model(str(adapter), device="cpu").model) != whole
    with loaded.disable_adapter():
        assert content(loaded) != whole
    loaded.base_model.model.model.layers[0].self_attn.q_proj.scaling["default"] = 0.5
    assert content(loaded) != whole


def build(run: Path, model: object, **settings: object) -> GradientStore:
    options = {"tokenizer": tiny.make_tokenizer(), "projection_dim": 0, "dtype": "float32", "quiet": True, **settings}
    return fa.collect_gradients(model, TEXTS, path=run, **options)


def age(folder: Path) -> None:
    for file in folder.iterdir():
        os.utime(file, ns=(10**18, 10**18))


def test_weights_of_a_folder_are_read_once(tmp_path: Path, cache: Path, hashed: list[int]) -> None:
    folder = tiny.save_model(tmp_path / "model", "gpt_neox")
    build(tmp_path / "young", str(folder))
    assert not cache.exists(), "a file this young may change without a new time"
    age(folder)
    weights = max(hashed)
    first = build(tmp_path / "first", str(folder)).manifest.model
    assert hashed.count(weights) == 2
    assert build(tmp_path / "second", str(folder)).manifest.model == first
    fa.Attributor(tmp_path / "second").ask(["w3 w4 w5"], 1)
    assert hashed.count(weights) == 2
    model = copy.deepcopy(load_model(str(folder), device="cpu").model)
    build(tmp_path / "memory", model)
    assert hashed.count(weights) == 3, "a model in memory may have been changed"
    os.utime(folder / "model.safetensors", ns=(10**18 + 1, 10**18 + 1))
    assert build(tmp_path / "third", str(folder)).manifest.model == first
    assert hashed.count(weights) == 4
    build(tmp_path / "half", str(folder), loading=fa_options("bf16"))
    assert hashed.count(weights) == 5
    cache.write_text('{"version": 1, "hashes": {"a": [1], "b": 3}}')
    assert build(tmp_path / "fourth", str(folder)).manifest.model == first
    assert hashed.count(weights) == 6


def fa_options(precision: str) -> object:
    from funcattrib.models.loading import LoadOptions

    return LoadOptions(precision=precision)


def edit_config(folder: Path) -> None:
    values = json.loads((folder / "config.json").read_text())
    values["rms_norm_eps"] = 0.5
    (folder / "config.json").write_text(json.dumps(values))


def edit_weights(folder: Path) -> None:
    model = load_model(str(folder), device="cpu").model
    with torch.no_grad():
        next(weight for name, weight in model.named_parameters() if "layers.0" in name and weight.ndim > 1)[0] += 1
    model.save_pretrained(folder)


@pytest.mark.parametrize("edit", [edit_config, edit_weights])
def test_an_edited_model_is_another(edit: Callable[[Path], None], tmp_path: Path) -> None:
    folder = tiny.save_model(tmp_path / "model", "llama")
    age(folder)
    before = build(tmp_path / "run", str(folder)).matrix()[:]
    edit(folder)
    with pytest.raises(
        fa.StoreError, match=r"holds another run: model: expected .*/model \(float32, [0-9a-f]{12}\), f"
    ):
        build(tmp_path / "run", str(folder))
    with pytest.raises(fa.FuncattribError, match="expected the model that made the store"):
        fa.Attributor(tmp_path / "run").ask(["w3 w4 w5"], 1)
    with pytest.raises(fa.FuncattribError, match="the queries and the training gradients differ in their model"):
        fa.score_gradients(
            str(folder), TEXTS, path=tmp_path / "out", query_stores=tmp_path / "run", projection_dim=0, quiet=True
        )
    assert not (build(tmp_path / "run", str(folder), overwrite=True).matrix()[:] == before).all()


def test_a_model_changed_between_two_traces(tmp_path: Path) -> None:
    model = copy.deepcopy(cases.causal("llama"))
    build(tmp_path / "run", model)
    attributor, ids = fa.Attributor(tmp_path / "run"), torch.tensor([[3, 4, 5]])
    for _ in range(2):
        with attributor.trace(model, 1) as found:
            model(input_ids=ids, labels=ids).loss.backward()
        assert len(found.hits) == 1
    one_value(model)
    with pytest.raises(fa.FuncattribError, match="expected the model that made the store"), attributor.trace(model, 1):
        pass


def test_a_moved_model_goes_on_with_its_run(tmp_path: Path) -> None:
    folder = tiny.save_model(tmp_path / "model", "gpt_neox")
    store = build(tmp_path / "run", str(folder), rows_per_shard=2)
    rows = store.matrix()[:]
    folder.rename(tmp_path / "moved")
    assert (build(tmp_path / "run", str(tmp_path / "moved"), rows_per_shard=2).matrix()[:] == rows).all()
    (tmp_path / "run" / "shards" / "00001.npy").unlink()  # that shard is computed again
    again = build(tmp_path / "run", str(tmp_path / "moved"), rows_per_shard=2)
    assert (again.matrix()[:] == rows).all()
    found = fa.Attributor(tmp_path / "run", model=tmp_path / "moved").ask([TEXTS[0]], 1)
    assert found[0][0].row == 0


def without_content(run: Path) -> None:
    """Make a run's manifest one of an earlier release."""
    values = json.loads((run / "manifest.json").read_text())
    del values["model"]["content"], values["computed_with"]["given_content"], values["checksum"]
    (run / "manifest.json").write_text(json.dumps(values))


def test_an_older_store_is_compared_by_its_samples(tmp_path: Path) -> None:
    model = copy.deepcopy(cases.causal("llama"))
    rows = build(tmp_path / "run", model, projection_dim=4).matrix()[:]
    without_content(tmp_path / "run")
    assert (build(tmp_path / "run", model, projection_dim=4).matrix()[:] == rows).all()
    attributor = fa.Attributor(tmp_path / "run", model=model, tokenizer=tiny.make_tokenizer())
    assert attributor.ask([TEXTS[1]], 1)[0][0].row == 1
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    with pytest.raises(fa.StoreError, match="holds another run: model: expected"):
        build(tmp_path / "run", model, projection_dim=4)
    with pytest.raises(fa.FuncattribError, match=r"expected the model that made the store .*, fingerprint "):
        fa.Attributor(tmp_path / "run", model=model, tokenizer=tiny.make_tokenizer()).ask([TEXTS[1]], 1)


def test_a_reference_in_another_place(tmp_path: Path) -> None:
    folder = tiny.save_model(tmp_path / "reference", "gpt_neox")
    settings = {"loss": "kl", "rows_per_shard": 2}
    build(tmp_path / "run", cases.causal("gpt_neox"), reference_model=str(folder), **settings)
    folder.rename(tmp_path / "moved")
    build(tmp_path / "run", cases.causal("gpt_neox"), reference_model=str(tmp_path / "moved"), **settings)
    edit_weights(tmp_path / "moved")
    with pytest.raises(fa.StoreError, match=r"holds another run: loss\.reference\.content: expected"):
        build(tmp_path / "run", cases.causal("gpt_neox"), reference_model=str(tmp_path / "moved"), **settings)

"""Loading a model: what is no causal language model is refused in words."""

import shutil
from pathlib import Path

import pytest
import torch
import transformers

import funcattrib as fa
from funcattrib.models.limits import context_length
from funcattrib.models.loading import is_causal, load_model
from tests.support import cases, tiny

BERT = transformers.BertConfig(
    vocab_size=61, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40
)


def refused(name: Path | str, message: str, **options: object) -> None:
    with pytest.raises(fa.FuncattribError, match=message) as caught:
        load_model(str(name), **options)
    assert str(caught.value).count("\n") <= 1


def test_a_model_comes_as_it_was_saved(model_folder: Path) -> None:
    loaded = load_model(str(model_folder), device="cpu")
    saved = cases.causal("gpt_neox")
    assert all(torch.equal(tensor, saved.state_dict()[name]) for name, tensor in loaded.model.state_dict().items())
    assert not loaded.model.training
    assert loaded.name == str(model_folder.resolve())
    assert loaded.tokenizer("w3 w4")["input_ids"] == tiny.make_tokenizer()("w3 w4")["input_ids"]
    assert load_model(str(model_folder), precision="bf16", device="cpu").model.dtype == torch.bfloat16


def test_a_tokenizer_of_its_own(tmp_path: Path, model_folder: Path) -> None:
    tiny.make_tokenizer().save_pretrained(tmp_path / "words")
    alone = tiny.save_model(tmp_path / "alone", tokenizer=False)
    assert load_model(str(alone)).tokenizer is None
    assert load_model(str(alone), tokenizer=str(tmp_path / "words")).tokenizer is not None


def test_folders_that_hold_no_model(tmp_path: Path, model_folder: Path) -> None:
    refused(tmp_path / "nothing", "the model folder .*nothing does not exist")
    refused("./nothing", "the model folder ./nothing does not exist")
    refused(tmp_path, "found no config.json there")
    (tmp_path / "file.json").write_text("{}")
    refused(tmp_path / "file.json", "found a file")
    for name, damage in (("config.json", "{"), ("model.safetensors", "x"), ("tokenizer.json", "{")):
        broken = tmp_path / f"broken-{name}"
        shutil.copytree(model_folder, broken)
        (broken / name).write_text(damage)
        refused(broken, "cannot be loaded")
    (broken / "model.safetensors").unlink()
    refused(broken, "cannot be loaded")


def test_a_checkpoint_without_its_head(tmp_path: Path) -> None:
    transformers.BertModel(BERT).save_pretrained(tmp_path / "bert")
    refused(tmp_path / "bert", r"found .*bert \(BertModel\), an encoder \(masked language model\)\ngive a decoder")
    cases.causal("gpt_neox").gpt_neox.save_pretrained(tmp_path / "body")
    refused(tmp_path / "body", "body lacks 1 weights of GPTNeoXForCausalLM, among them")


def test_a_model_that_is_not_causal(tmp_path: Path) -> None:
    torch.manual_seed(0)
    transformers.BertLMHeadModel(BERT).save_pretrained(tmp_path / "bert")
    refused(tmp_path / "bert", "is not a causal language model: BertLMHeadModel attends to later tokens")
    transformers.BertForMaskedLM(BERT).save_pretrained(tmp_path / "masked")
    refused(tmp_path / "masked", r"found .*masked \(BertForMaskedLM\), an encoder \(masked language model\)")
    transformers.BertForTokenClassification(BERT).save_pretrained(tmp_path / "tagger")
    refused(
        tmp_path / "tagger", r"\(BertForTokenClassification\), a model for token classification\ngive \(loss, params"
    )


@pytest.mark.parametrize("name", cases.EVERY)
def test_models_that_are_causal(name: str) -> None:
    assert is_causal(cases.causal(name))


def test_devices_and_precisions(model_folder: Path) -> None:
    refused(model_folder, "expected a device such as cpu or cuda, found 'abacus'", device="abacus")
    refused(model_folder, "device 'cuda:77' is not available on this machine", device="cuda:77")
    refused(model_folder, "expected a precision of auto, fp32, bf16, fp16, int8, int4, found 'fp8'", precision="fp8")


def test_a_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("funcattrib.models.locate.hub_reachable", lambda: False)
    refused("nobody/nothing", "the hub does not answer, and there is no copy in the cache\ncheck the name")
    refused("nothing", "the hub does not answer")


def test_context() -> None:
    model = cases.causal("gpt_neox")
    assert context_length(model) == 64
    assert context_length(model, asked=10) == 10
    with pytest.raises(fa.FuncattribError, match="within the model's context of 64 tokens, found 65"):
        context_length(model, asked=65)
    unbounded = torch.nn.Linear(1, 1)
    assert context_length(unbounded) == 2048
    assert context_length(unbounded, tiny.make_tokenizer()) == 64
    assert context_length(unbounded, asked=10_000) == 10_000

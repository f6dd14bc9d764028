"""Models are recognised by what they are: by their class, and by their configuration alone."""

import pytest
import transformers
from torch import nn

import funcattrib as fa
from funcattrib.models.task import task_of, task_of_config
from tests.support import cases, other_tasks

TINY = {"vocab_size": 61, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
VISION = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}


def bert(head: str) -> nn.Module:
    return getattr(transformers, f"Bert{head}")(transformers.BertConfig(**TINY))


def test_models_that_have_a_loss() -> None:
    assert [task_of(cases.causal(name)) for name in cases.KINDS] == ["causal_lm"] * len(cases.KINDS)
    assert {task_of(other_tasks.classifier(name)) for name in other_tasks.CLASSIFIERS} == {"sequence_classification"}
    assert {task_of(other_tasks.pair(name)) for name in other_tasks.PAIRS} == {"seq2seq"}
    assert task_of(nn.Linear(2, 2)) == "causal_lm"  # nothing is known of it, and the loss will say
    wrapped = nn.Sequential(other_tasks.pair("t5"))
    assert task_of(wrapped) == "seq2seq"


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda: bert("ForMaskedLM"), r"BertForMaskedLM, an encoder \(masked language model\)\ngive a decoder"),
        (lambda: bert("Model"), r"BertModel, an encoder \(masked language model\)"),
        (lambda: bert("ForPreTraining"), r"BertForPreTraining, an encoder"),
        (lambda: bert("ForTokenClassification"), r"BertForTokenClassification, a model for token classification\ngive"),
        (lambda: bert("ForQuestionAnswering"), r"a model for question answering"),
        (
            lambda: transformers.ViTForImageClassification(
                transformers.ViTConfig(**VISION, image_size=8, patch_size=4)
            ),
            r"ViTForImageClassification, a model for image classification\ngive \(loss, params\)",
        ),
        (
            lambda: transformers.ViTModel(transformers.ViTConfig(**VISION, image_size=8, patch_size=4)),
            r"ViTModel, a model of other inputs than text",
        ),
        (
            lambda: transformers.T5Model(other_tasks.pair("t5").config),
            r"T5Model, an encoder-decoder without its head",
        ),
    ],
)
def test_models_that_have_none(make, what: str) -> None:
    for function in (fa.causal_lm_loss, task_of):
        with pytest.raises(fa.FuncattribError, match=what):
            function(make())


def test_where_a_causal_model_is_expected_the_right_loss_is_named() -> None:
    with pytest.raises(
        fa.FuncattribError, match=r"found BertForSequenceClassification, .*\nuse sequence_classification_l"
    ):
        fa.causal_lm_loss(other_tasks.classifier("bert"))
    with pytest.raises(
        fa.FuncattribError, match=r"found BartForConditionalGeneration, an .*\nuse seq2seq_loss\(model\)"
    ):
        fa.causal_lm_loss(other_tasks.pair("bart"))


def config(kind: str, *architectures: str, **more: object) -> transformers.PretrainedConfig:
    return getattr(transformers, f"{kind}Config")(architectures=list(architectures) or None, **more)


@pytest.mark.parametrize(
    ("described", "task"),
    [
        (config("GPT2", "GPT2LMHeadModel"), "causal_lm"),
        (config("GPT2"), "causal_lm"),
        (config("GPT2", "GPT2Model"), "causal_lm"),  # with tied weights it has its head
        (config("GPT2", "SomebodysForCausalLM"), "causal_lm"),
        (config("Bert", "BertForMaskedLM", is_decoder=True), "causal_lm"),
        (config("Bart", "BartForCausalLM", is_encoder_decoder=False), "causal_lm"),
        (config("Llama", "LlamaForSequenceClassification"), "sequence_classification"),
        (config("Bart", "BartForSequenceClassification"), "sequence_classification"),
        (config("Llama", "SomebodysForSequenceClassification"), "sequence_classification"),
        (config("T5", "T5ForConditionalGeneration"), "seq2seq"),
        (config("T5", "T5WithLMHeadModel"), "seq2seq"),  # its name in old checkpoints
        (config("T5"), "seq2seq"),
    ],
)
def test_configurations(described: transformers.PretrainedConfig, task: str) -> None:
    assert task_of_config(described, "it") == task


@pytest.mark.parametrize(
    ("described", "what"),
    [
        (config("Roberta", "RobertaForMaskedLM"), "found it (RobertaForMaskedLM), an encoder (masked language model)"),
        (config("DistilBert"), "found it, an encoder (masked language model)"),
        (config("T5", "T5Model"), "an encoder-decoder without its head"),
        (
            config("Whisper", "WhisperForConditionalGeneration"),
            "found it (WhisperForConditionalGeneration), a multimodal",
        ),
        (config("Llava", "LlavaForConditionalGeneration"), "a multimodal model\nload it and give the model"),
    ],
)
def test_configurations_of_other_kinds(described: transformers.PretrainedConfig, what: str) -> None:
    with pytest.raises(fa.FuncattribError) as error:
        task_of_config(described, "it")
    assert what in str(error.value)

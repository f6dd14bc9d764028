"""The task that a model was made for, read off its class or its configuration, and the loss that belongs to it."""

from functools import cache
from typing import Any, Literal, NamedTuple, cast, get_args

import transformers
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from funcattrib.errors import FuncattribError
from funcattrib.models.skeleton import own_class

Task = Literal["causal_lm", "sequence_classification", "seq2seq"]
"""A task with a loss of that name in the library: ``causal_lm_loss``, ``sequence_classification_loss``, …"""

_NAMES: dict[Task, str] = {
    "causal_lm": "a causal language model",
    "sequence_classification": "a sequence classification model",
    "seq2seq": "an encoder-decoder",
}
_ENCODER = "an encoder (masked language model)"
_MULTIMODAL = "a multimodal model"
_OWN_LOSS = "give (loss, params) with a loss in Python that calls it"
_CURES = {
    _ENCODER: "give a decoder (in its config.json, is_decoder: true), the encoder with a classification head, or "
    "(loss, params) with a loss in Python",
    _MULTIMODAL: f"load it and give the model where text alone is to count, or {_OWN_LOSS}",
}
_MULTIMODAL_TASKS = (
    "IMAGE_TEXT_TO_TEXT",
    "MULTIMODAL_LM",
    "SPEECH_SEQ_2_SEQ",
    "VISUAL_QUESTION_ANSWERING",
    "ZERO_SHOT_IMAGE_CLASSIFICATION",
)
_LAST = ("PRETRAINING", "TEXT_ENCODING", "RETRIEVAL", "BACKBONE", "IMAGE")  # name no task, or several


class _Kind(NamedTuple):
    """A kind of model: the task where the library has its loss, and what to call it."""

    task: Task | None
    words: str


def task_of(model: nn.Module) -> Task:
    """Return the task of a model, by its class; what is no transformers model passes for a causal language model.

    Raises:
        FuncattribError: a model of a kind that the library has no loss for; the message names it.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        >>> task_of(BertForSequenceClassification(BertConfig(vocab_size=10, **size)))
        'sequence_classification'
    """
    name, kind = _kind_of_model(model)
    return _supported(name, kind)


def task_of_config(config: PretrainedConfig, name: str) -> Task:
    """Return the task of the model that a configuration describes; ``name`` is what messages call it.

    Raises:
        FuncattribError: a model of a kind that the library has no loss for; the message names it.

    Example:
        >>> from transformers import T5Config
        >>> task_of_config(T5Config(architectures=["T5ForConditionalGeneration"]), "t5-small")
        'seq2seq'
    """
    architecture = next(iter(config.architectures or ()), "")
    kind = _kind(architecture, config)
    if kind.words == _ENCODER and getattr(config, "is_decoder", False):
        kind = _Kind("causal_lm", _NAMES["causal_lm"])
    return _supported(f"{name} ({architecture})" if architecture else name, kind)


def require_task(model: nn.Module, task: Task) -> None:
    """Refuse a model of another kind than a loss is made for.

    Raises:
        FuncattribError: naming the kind, and the loss to use.
    """
    name, kind = _kind_of_model(model)
    if kind.task != task:
        raise FuncattribError(
            f"expected {_NAMES[task]}, found {name}, {kind.words}\n"
            + (f"use {kind.task}_loss(model)" if kind.task else _cure(kind))
        )


def require_causal_config(config: PretrainedConfig, name: str) -> None:
    """Refuse the configuration of another model than a causal language model, where no other is supported.

    Raises:
        FuncattribError: naming the kind.
    """
    task = task_of_config(config, name)
    if task != "causal_lm":
        raise FuncattribError(f"expected a causal language model, found {name}, {_NAMES[task]}\ngive another `model`")


def _supported(name: str, kind: _Kind) -> Task:
    if kind.task is None:
        known = ", ".join(_NAMES[task] for task in get_args(Task)[:-1])
        raise FuncattribError(f"expected {known} or {_NAMES['seq2seq']}, found {name}, {kind.words}\n{_cure(kind)}")
    return kind.task


def _cure(kind: _Kind) -> str:
    return _CURES.get(kind.words, _OWN_LOSS)


def _kind_of_model(model: nn.Module) -> tuple[str, _Kind]:
    """Find the transformers model, which a wrapper (an adapter's) may have inside; a multimodal one that writes text
    is a language model on text alone.
    """
    inner = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if inner is None:
        return own_class(model).__name__, _Kind("causal_lm", _NAMES["causal_lm"])
    name = own_class(inner).__name__
    kind = _kind(name, inner.config)
    if kind.words == _MULTIMODAL and _listed(name) & {"IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM"} and _reads_text(name):
        return name, kind._replace(task="seq2seq" if inner.config.is_encoder_decoder else "causal_lm")
    return name, kind


def _kind(architecture: str, config: Any) -> _Kind:
    """Return the kind of a model class; of one that transformers does not list, by its name and configuration."""
    listed = _listed(architecture)
    paired = bool(getattr(config, "is_encoder_decoder", False))
    if "CAUSAL_LM" in listed:
        return _known("causal_lm")
    if "SEQUENCE_CLASSIFICATION" in listed or (not listed and architecture.endswith("ForSequenceClassification")):
        return _known("sequence_classification")
    if listed & set(_MULTIMODAL_TASKS):
        return _Kind(None, _MULTIMODAL)
    if "MASKED_LM" in listed and not paired:
        return _Kind(None, _ENCODER)
    if "SEQ_TO_SEQ_CAUSAL_LM" in listed:
        return _known("seq2seq") if paired else _Kind(None, _MULTIMODAL)
    if heads := sorted(listed - {*_LAST, ""}):
        return _Kind(None, f"a model for {heads[0].replace('_', ' ').lower()}")
    if not _reads_text(architecture):
        return _Kind(None, "a model of other inputs than text")
    if paired:  # a class of other authors, no head, or no class at all
        headless = bool(listed) and "PRETRAINING" not in listed
        return _Kind(None, "an encoder-decoder without its head") if headless else _known("seq2seq")
    headless = bool(listed) and not getattr(config, "is_decoder", False)
    if architecture.endswith("ForMaskedLM") or _encodes(str(getattr(config, "model_type", "")), headless):
        return _Kind(None, _ENCODER)
    return _known("causal_lm")


def _known(task: Task) -> _Kind:
    return _Kind(task, _NAMES[task])


@cache
def _listed(architecture: str) -> frozenset[str]:
    """Return the tasks that transformers lists a class for, as its mappings call them; "" for a base model."""
    prefix, suffix = "MODEL_FOR_", "_MAPPING_NAMES"
    found = set()
    for name, mapping in vars(modeling_auto).items():
        if name.endswith(suffix) and name.startswith("MODEL_"):
            classes = {each for value in mapping.values() for each in (value if isinstance(value, tuple) else [value])}
            if architecture in classes:
                found.add(name.removeprefix(prefix).removesuffix(suffix) if name.startswith(prefix) else "")
    return frozenset(found)


def _reads_text(architecture: str) -> bool:
    """Return whether a class takes tokens; one that transformers does not have is believed to."""
    try:
        found = getattr(transformers, architecture or "", None)
        return cast("str", getattr(found, "main_input_name", "input_ids")) == "input_ids"
    except ImportError:  # transformers lists the class, and lacks a package for it
        return False


def _encodes(model_type: str, headless: bool) -> bool:
    """Return whether models of a type are encoders: those with a masked form, and no causal one (or no head of it)."""
    causal = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return model_type in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES and (headless or model_type not in causal)

"""Loading models and tokenizers from the hub or a folder, and telling checkpoints apart by content."""

import importlib.util
import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from funcattrib.errors import FuncattribError
from funcattrib.models.adapter import adapter_on, base_of
from funcattrib.models.functional import functionalize
from funcattrib.models.identity_cache import FileStamp, stamps_of
from funcattrib.models.limits import vocabulary
from funcattrib.models.locate import locate, quietly, readable
from funcattrib.models.sharded_loading import Shards, load_sharded
from funcattrib.models.skeleton import is_quantised
from funcattrib.models.task import Task, task_of_config
from funcattrib.runtime.devices import pick_device
from funcattrib.runtime.hub import why

log = logging.getLogger(__name__)

_DTYPES: dict[str, Any] = {"auto": "auto", "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_CODES: dict[str, dict[str, Any]] = {
    "int8": {"load_in_8bit": True},
    "int4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
}
PRECISIONS = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "int8": "int8", "int4": "int4"}
"""The name of a dtype in a manifest, and the precision that loads a model in it."""
AUTO_CLASSES: dict[Task, Any] = {
    "causal_lm": AutoModelForCausalLM,
    "sequence_classification": AutoModelForSequenceClassification,
    "seq2seq": AutoModelForSeq2SeqLM,
}
"""The class that makes a model of a task."""
_TOKENIZER_FILES = ("*token*", "vocab*", "merges*", "*.model", "spiece*", "tekken*")


class Loaded(NamedTuple):
    """A model, its tokenizer (None where the folder has none) and its name: a hub id, or a folder's path.

    ``reference`` is a model to compare it with, where one was asked for. ``stamps`` are of the files that the model was
    loaded from, for ``model_identity``.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase | None
    name: str
    revision: str | None
    reference: "Loaded | None" = None
    stamps: tuple[FileStamp, ...] | None = None


class LoadOptions(NamedTuple):
    """Settings of loading models, whichever they are; ``load_model`` takes them by these names.

    Attributes:
        precision: ``auto``, ``fp32``, ``bf16``, ``fp16``, ``int8`` or ``int4``.
        device: ``cpu``, ``cuda`` or ``cuda:N``; ``auto`` takes a GPU where there is one.
        trust_remote_code: run code that comes with the checkpoint.
        shards: the ranks that hold the model together.

    Example:
        >>> LoadOptions(precision="bf16", device="cpu")
        LoadOptions(precision='bf16', device='cpu', trust_remote_code=False, shards=None)
    """

    precision: str = "fp32"
    device: str = "auto"
    trust_remote_code: bool = False
    shards: Shards | None = None


def load_model(
    name: str,
    *,
    tokenizer: str | None = None,
    revision: str | None = None,
    precision: str = "fp32",
    device: str = "auto",
    trust_remote_code: bool = False,
    shards: Shards | None = None,
) -> Loaded:
    """Load a causal language model, a sequence classification model or an encoder-decoder, whichever its configuration
    says, in eval mode, from safetensors, and its tokenizer.

    Args:
        name: a hub id or a folder; of a PEFT adapter, its base is loaded too.
        precision: ``auto`` (the checkpoint's own), ``fp32``, ``bf16``, ``fp16``; ``int8`` or ``int4`` (nf4) quantise
            the blocks' linear layers with bitsandbytes, and leave the rest in the checkpoint's own.
        shards: the ranks that hold the model together: each reads its own rows.

    Raises:
        FuncattribError: no such model, an unreachable hub, a checkpoint of a kind that has no loss or that lacks
            weights, an unknown device.
    """
    if precision not in {**_DTYPES, **_CODES}:
        raise FuncattribError(f"expected a precision of {', '.join([*_DTYPES, *_CODES])}, found {precision!r}")
    target = pick_device(device)
    source = locate(name)
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    stamps = stamps_of(source, revision)
    with readable(name, source):
        base = base_of(source, revision)
        if base is None:
            task = task_of_config(AutoConfig.from_pretrained(source, **options), name)
            auto = AUTO_CLASSES[task]
            if shards is not None:
                dtype = _DTYPES.get(precision, "auto")
                model = load_sharded(source, dtype, shards, options, _codes(precision), auto=auto)
            else:
                model = _whole(name, source, precision, target, options, auto)
    if base is not None:
        same = LoadOptions(precision, device, trust_remote_code, shards)
        loaded = load_model(base.name, revision=base.revision, **same._asdict())
        with readable(name, source):
            model = adapter_on(loaded.model, source, revision)
        words = _own_tokenizer(name, tokenizer, options) or loaded.tokenizer
        both = None if stamps is None or loaded.stamps is None else (*loaded.stamps, *stamps)
        return Loaded(model.eval(), words, _called(name, source), revision, stamps=both)
    causal = task != "causal_lm" or is_causal(model)
    if shards is not None:
        shards.gathers.settle()
    if not causal:
        raise FuncattribError(
            f"{name} is not a causal language model: {type(model).__name__} attends to later tokens\n"
            "give a decoder (in its config.json, is_decoder: true)"
        )
    return Loaded(model, _own_tokenizer(name, tokenizer, options), _called(name, source), revision, stamps=stamps)


def _whole(
    name: str, source: Path | str, precision: str, target: torch.device, options: Mapping[str, Any], auto: Any
) -> nn.Module:
    """Load the model on one device."""
    settings: dict[str, Any] = {"dtype": _DTYPES.get(precision, "auto"), **options}
    if (quantisation := _codes(precision)) is not None:
        settings |= {"quantization_config": quantisation, "device_map": {"": target}}
    loaded: Any = auto.from_pretrained(source, use_safetensors=True, output_loading_info=True, **settings)
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise FuncattribError(
            f"{name} lacks {len(missing)} weights of {type(model).__name__}, among them {missing[0]}\n"
            "give a checkpoint saved with its head"
        )
    codes = any(map(is_quantised, model.modules()))  # bitsandbytes has put them where they belong
    placed: nn.Module = model.eval() if codes else model.to(target).eval()
    return placed


def _codes(precision: str) -> BitsAndBytesConfig | None:
    """Return the configuration that quantises a model in this precision; None where nothing does."""
    if precision not in _CODES:
        return None
    for package in ("bitsandbytes", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise FuncattribError(
                f"`precision='{precision}'` requires {package}, which is not installed\n"
                "install it, e.g. with pip install 'funcattrib[gpu]', or use bf16"
            )
    return BitsAndBytesConfig(**_CODES[precision])


def _called(name: str, source: Path | str) -> str:
    return name if isinstance(source, str) else str(source.resolve())


def _own_tokenizer(name: str, tokenizer: str | None, options: Mapping[str, Any]) -> PreTrainedTokenizerBase | None:
    return load_tokenizer(tokenizer, {**options, "revision": None}) if tokenizer else load_tokenizer(name, options)


def load_config(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> PretrainedConfig:
    """Load a model's configuration alone; its weights need not be there.

    Raises:
        FuncattribError: no configuration that can be read.
    """
    source = locate(name)
    with readable(name, source, "config.json (of an adapter, its base's)"):
        return AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)


def load_tokenizer(name: str, options: Mapping[str, Any]) -> PreTrainedTokenizerBase | None:
    """Load the tokenizer of a model; None where a local folder has none (data that is tokenised already needs none)."""
    source = locate(name)
    # Where there are no files, transformers makes a tokenizer that knows no words.
    if isinstance(source, Path) and not any(found for glob in _TOKENIZER_FILES for found in source.glob(glob)):
        return None
    try:
        with quietly(source):
            tokenizer = AutoTokenizer.from_pretrained(source, **options)
    except Exception as error:
        raise FuncattribError(
            f"the tokenizer {name!r} cannot be loaded: {why(error)}\ngive one with `tokenizer`"
        ) from error
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise FuncattribError(f"the tokenizer {name!r} has an empty vocabulary\ngive another with `tokenizer`")
    return tokenizer


@torch.no_grad()
def is_causal(model: nn.Module) -> bool:
    """Return whether the logits of earlier tokens are independent of later ones, tried on eight tokens."""
    ids = torch.arange(2, 10, device=next(model.parameters()).device)[None] % (vocabulary(model) or 10)
    changed = ids.clone()
    changed[0, -1] = ids[0, 0]
    call: Callable[..., Any] = model
    if any(map(is_quantised, model.modules())):  # bitsandbytes' own forward looks at all tokens for outliers
        parts = functionalize(model, "all")
        call = partial(parts.call, parts.params)
    logits = [call(input_ids=x).logits[0, :-1] for x in (ids, changed)]
    tolerance = 1e-5 if logits[0].dtype in (torch.float32, torch.float64) else 2e-2
    first, second = (x.float() for x in logits)
    return not bool((first - second).abs().max() > tolerance * first.abs().max())

"""Loading models and tokenizers from the hub or a folder, and telling checkpoints apart by content."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from funcattrib.errors import FuncattribError

_PRECISION = {"auto": "auto", "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_SAMPLES = 1024


class Loaded(NamedTuple):
    """A model, its tokenizer (None where the folder has none) and what it was called."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase | None
    name: str
    revision: str | None


def load_model(
    name: str,
    *,
    tokenizer: str | None = None,
    revision: str | None = None,
    precision: str = "fp32",
    device: str = "auto",
    trust_remote_code: bool = False,
) -> Loaded:
    """Load a causal language model in eval mode, from safetensors, and its tokenizer.

    Raises:
        FuncattribError: no such model, an unreachable hub, no causal language model, an unknown device.
    """
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    target = pick_device(device)
    looks_local = os.path.sep in name and (name.startswith((".", os.path.sep, "~")) or name.count(os.path.sep) > 1)
    folder = Path(name).expanduser()
    if folder.exists() and not (folder / "config.json").exists():
        raise FuncattribError(
            f"expected a Hugging Face model in {name}, found no config.json there; give another --model"
        )
    if looks_local and not folder.exists():
        raise FuncattribError(f"expected a model folder at {name}, found nothing there; give another --model")
    if precision not in _PRECISION:
        raise FuncattribError(f"expected a precision of {', '.join(_PRECISION)}, found {precision!r}")
    was_shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        AutoConfig.from_pretrained(folder if folder.exists() else name, **options)
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder if folder.exists() else name, dtype=_PRECISION[precision], use_safetensors=True, **options
        )
    except (OSError, ValueError, KeyError) as error:
        raise FuncattribError(
            f"expected a causal language model at {name!r}, found none that loads: {_first_line(error)}\n"
            "check the name, the connection to the hub, or give a folder with config.json and model.safetensors"
        ) from error
    finally:
        if was_shown:
            transformers_logging.enable_progress_bar()
    return Loaded(model.to(target).eval(), load_tokenizer(tokenizer or name, options), name, revision)


def load_tokenizer(name: str, options: Mapping[str, Any]) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a model; None where a local folder has none (data that is tokenised already needs none)."""
    folder = Path(name).expanduser()
    try:
        return AutoTokenizer.from_pretrained(folder if folder.exists() else name, **options)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        if folder.exists() and not any(folder.glob("*token*")):
            return None
        raise FuncattribError(
            f"expected a tokenizer at {name!r}, found none that loads: {_first_line(error)}\ngive one with --tokenizer"
        ) from error


def pick_device(device: str) -> torch.device:
    """``auto`` is a GPU where there is one.

    Raises:
        FuncattribError: a device that torch does not know or that is not there.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise FuncattribError(
            f"expected a device such as cpu or cuda, found {device!r}: {_first_line(error)}"
        ) from error
    return chosen


def model_identity(model: nn.Module, name: str | None = None, revision: str | None = None) -> dict[str, Any]:
    """What the manifest keeps of a model: its name, and a fingerprint of its configuration and weights.

    The fingerprint hashes up to 1024 values of each parameter, evenly spaced: it tells checkpoints apart without
    reading terabytes, and is the same on every device.
    """
    config = getattr(model, "config", None)
    return {
        "id": name or getattr(config, "name_or_path", "") or type(model).__name__,
        "revision": revision,
        "architecture": type(model).__name__,
        "fingerprint": fingerprint(dict(model.named_parameters())),
    }


def fingerprint(params: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes, dtypes and evenly spaced values of every parameter."""
    whole = hashlib.sha256()
    for name, tensor in params.items():
        whole.update(json.dumps([name, list(tensor.shape), str(tensor.dtype)]).encode())
        flat = tensor.detach().reshape(-1)
        step = max(1, flat.numel() // _SAMPLES)
        whole.update(flat[::step][:_SAMPLES].float().cpu().numpy().tobytes())
    return whole.hexdigest()


def context_length(model: nn.Module, tokenizer: PreTrainedTokenizerBase | None) -> int:
    """The model's context in tokens, from its configuration, else the tokenizer's; 2048 where neither says."""
    config = getattr(model, "config", None)
    text = config.get_text_config() if config is not None and hasattr(config, "get_text_config") else config
    for name in ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length"):
        value = getattr(text, name, None)
        if isinstance(value, int) and value > 0:
            return value
    limit = getattr(tokenizer, "model_max_length", None)
    return int(limit) if isinstance(limit, int) and 0 < limit < 10**9 else 2048


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__

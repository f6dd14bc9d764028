"""Loading models and tokenizers from the hub or a folder, and telling checkpoints apart by content."""

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from funcattrib.data.hub import hub_reachable, offline
from funcattrib.data.reason import reason
from funcattrib.errors import FuncattribError
from funcattrib.launcher import launched, local_rank

log = logging.getLogger(__name__)

_PRECISION = {"auto": "auto", "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PRECISIONS = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
"""The name of a dtype in a manifest, and the precision that loads a model in it."""
_SAMPLES = 1024
_TOKENIZER_FILES = ("*token*", "vocab*", "merges*", "*.model", "spiece*", "tekken*")


class Loaded(NamedTuple):
    """A model, its tokenizer (None where the folder has none) and what it is called: a hub id, or a folder's path.

    ``reference`` is a model to compare it with, where one was asked for.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase | None
    name: str
    revision: str | None
    reference: nn.Module | None = None


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
        FuncattribError: no such model, an unreachable hub, a checkpoint that is no causal language model or lacks
            weights, an unknown device.
    """
    if precision not in _PRECISION:
        raise FuncattribError(f"expected a precision of {', '.join(_PRECISION)}, found {precision!r}")
    target = pick_device(device)
    source = _locate(name)
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        with _from(source):
            AutoConfig.from_pretrained(source, **options)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source, dtype=_PRECISION[precision], use_safetensors=True, output_loading_info=True, **options
            )
    except Exception as error:  # whatever a file written by others makes its reader raise
        raise FuncattribError(
            f"expected a causal language model at {name!r}, found none that loads: {_reason(error)}\n"
            "check the name and the connection to the hub, or give a folder with config.json and model.safetensors"
        ) from error
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise FuncattribError(
            f"expected every weight of {type(model).__name__} in {name}, found {len(missing)} missing, among them "
            f"{missing[0]}\ngive a checkpoint saved with its language-model head"
        )
    model = model.to(target).eval()
    if not is_causal(model):
        raise FuncattribError(
            f"expected a causal language model at {name}, found that {type(model).__name__} looks at later tokens\n"
            "give a decoder (in its config.json, is_decoder: true)"
        )
    own = load_tokenizer(tokenizer, {**options, "revision": None}) if tokenizer else load_tokenizer(name, options)
    return Loaded(model, own, name if isinstance(source, str) else str(source.resolve()), revision)


def load_config(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> PretrainedConfig:
    """A model's configuration alone; its weights need not be there.

    Raises:
        FuncattribError: no configuration that can be read.
    """
    source = _locate(name)
    try:
        with _from(source):
            return AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever a file written by others makes its reader raise
        raise FuncattribError(
            f"expected a model's config.json at {name!r}, found none that can be read: {_reason(error)}\n"
            "check the name and the connection to the hub, or give a folder that has one"
        ) from error


def load_tokenizer(name: str, options: Mapping[str, Any]) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a model; None where a local folder has none (data that is tokenised already needs none)."""
    source = _locate(name)
    # Where there are no files, transformers makes a tokenizer that knows no words.
    if isinstance(source, Path) and not any(found for glob in _TOKENIZER_FILES for found in source.glob(glob)):
        return None
    try:
        with _from(source):
            tokenizer = AutoTokenizer.from_pretrained(source, **options)
    except Exception as error:
        raise FuncattribError(
            f"expected a tokenizer at {name!r}, found none that loads: {_reason(error)}\ngive one with --tokenizer"
        ) from error
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise FuncattribError(f"expected a tokenizer with words at {name!r}, found none\ngive one with --tokenizer")
    return tokenizer


@torch.no_grad()
def is_causal(model: nn.Module) -> bool:
    """Whether the logits of earlier tokens are independent of later ones, tried on eight tokens."""
    ids = torch.arange(2, 10, device=next(model.parameters()).device)[None] % (vocabulary(model) or 10)
    changed = ids.clone()
    changed[0, -1] = ids[0, 0]
    logits = [model(input_ids=x).logits[0, :-1] for x in (ids, changed)]
    tolerance = 1e-5 if logits[0].dtype in (torch.float32, torch.float64) else 2e-2
    first, second = (x.float() for x in logits)
    return not bool((first - second).abs().max() > tolerance * first.abs().max())


def pick_device(device: str) -> torch.device:
    """``auto`` is a GPU where there is one; of several processes on a machine, each has its own.

    Raises:
        FuncattribError: a device that torch does not know or that is not there.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and launched():
        device = f"cuda:{local_rank() % max(1, torch.cuda.device_count())}"
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise FuncattribError(f"expected a device such as cpu or cuda, found {device!r}") from error
    try:
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise FuncattribError(f"expected a device that is here, found {device!r}: {_reason(error)}") from error
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
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
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


def vocabulary(model: nn.Module) -> int | None:
    """The number of tokens the model knows, where it says."""
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    return embedding.weight.shape[0] if embedding is not None else None


def context_length(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase | None = None, *, asked: int | None = None
) -> int:
    """The longest document in tokens: what is asked for, else the model's context, the tokenizer's, or 2048.

    Raises:
        FuncattribError: more is asked for than the model's configuration allows.
    """
    config = getattr(model, "config", None)
    text = config.get_text_config() if config is not None and hasattr(config, "get_text_config") else config
    names = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")
    own = next((value for name in names if isinstance(value := getattr(text, name, None), int) and value > 0), None)
    if asked is not None:
        if own is not None and asked > own:
            raise FuncattribError(f"expected a longest document within the model's context of {own}, found {asked}")
        return asked
    limit = getattr(tokenizer, "model_max_length", None)
    return own or (limit if isinstance(limit, int) and 0 < limit < 10**9 else 2048)


def _locate(name: str) -> Path | str:
    """A folder's path, or a hub id as it is."""
    folder = Path(name).expanduser()
    if folder.exists():
        if not folder.is_dir() or not any(folder.glob("*.json")):
            found = "no config.json there" if folder.is_dir() else "a file"
            raise FuncattribError(f"expected a Hugging Face model in {name}, found {found}; give its folder")
        return folder
    if name.startswith((".", "~", os.path.sep)) or name.count("/") > 1:
        raise FuncattribError(f"expected a model folder at {name}, found nothing there; give another --model")
    return name


@contextmanager
def _from(source: Path | str) -> Iterator[None]:
    """Quietly; and without waiting for a hub that does not answer: what is in the cache will do."""
    shown, level = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        with ExitStack() as stack:
            if unreachable := isinstance(source, str) and not hub_reachable():
                stack.enter_context(offline())
            yield
            if unreachable:
                log.warning("the hub does not answer: using the copy of %s in the cache", source)
    finally:
        transformers_logging.set_verbosity(level)
        if shown:
            transformers_logging.enable_progress_bar()


def _reason(error: BaseException) -> str:
    links = [error]
    while (cause := links[-1].__cause__) is not None:
        links.append(cause)
    if any(isinstance(link, LocalEntryNotFoundError) for link in links):
        return "the hub does not answer, and there is no copy in the cache"
    return reason(error).rstrip(".")

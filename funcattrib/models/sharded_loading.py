"""A causal language model read from safetensors into the shards of a group of ranks.

    file → the rows of this rank, or the codes of its blocks → Stored parameters of the model

Each rank reads its own rows of every weight. Where transformers' conversion makes a weight of several tensors (a
mixture's experts), those of this rank's experts are read; any other conversion makes one whole weight at a time. No
rank ever holds the whole model: it is built without weights, and its buffers (rotary frequencies, masks) by its own
constructor.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    build_glob_alternation,
    dot_natural_key,
    rename_source_key,
)
from transformers.initialization import no_init_weights
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from funcattrib.errors import FuncattribError
from funcattrib.models.quantised_loading import Layer, quantised_layers, quantised_rows, saved_blocks, saved_settings
from funcattrib.weights.sharded import Gathers, Sharded, row_range
from funcattrib.weights.sharded_quantised import QuantFormat, ShardedQuantised
from funcattrib.weights.stored import Stored


class Shards(NamedTuple):
    """The group that holds the model, and its devices.

    Attributes:
        gathers: of the group of ranks that hold one copy together.
        device: where weights are gathered and used.
        offload: whether shards stay on the CPU, and are moved for their use.
    """

    gathers: Gathers
    device: torch.device
    offload: bool = False


class _Origin(NamedTuple):
    """Origin of a weight: tensors of the files, by the pattern that a converter knows them by."""

    parts: list[tuple[str, str]]
    converter: WeightConverter | None


class _Part(NamedTuple):
    """This rank's part of a weight: its rows, or its quantised blocks; a buffer or a single number whole."""

    rows: Tensor
    coding: QuantFormat | None = None


def load_sharded(
    source: str | Path,
    dtype: torch.dtype | str,
    shards: Shards,
    options: Mapping[str, Any],
    quantisation: BitsAndBytesConfig | None = None,
    *,
    auto: Any = AutoModelForCausalLM,
) -> nn.Module:
    """Load the model of a folder or hub id, in eval mode, its parameters in shards.

    Args:
        dtype: of the weights; ``auto`` takes what the configuration or else the files say, as codes in the files do.
        options: of ``from_pretrained``: revision, trust_remote_code.
        auto: transformers' class of the model's task.
        quantisation: of the linear layers, as transformers has it; codes in the files are taken as they are.

    Raises:
        FuncattribError: a weight of the model that the files do not have, or have in another shape; codes of another
            kind than bitsandbytes'.
    """
    config = AutoConfig.from_pretrained(source, **options)
    with ExitStack() as opened:
        tensors = _tensors(source, opened, options.get("revision"))
        saved = saved_settings(config)
        if dtype == "auto" or saved is not None:
            dtype = config.dtype or next(iter(tensors.values()))[:0].dtype
        assert isinstance(dtype, torch.dtype)
        with no_init_weights(), _parameters_without_values():
            trust = options.get("trust_remote_code", False)
            model = auto.from_config(config, dtype=dtype, trust_remote_code=trust)
        settings = quantisation if saved is None else saved
        layers = {} if settings is None else quantised_layers(model, settings, saved is not None, dtype)
        model.tie_weights()
        origins = _origins(model, tensors)
        places = _places(model)
        wanted = _dtypes(model, dtype)
        done: set[str] = set()
        for names in places:
            first = next((name for name in names if name in origins), None)
            if first is None or first in done:
                continue
            for name, part in _read(model, first, origins[first], tensors, layers, wanted, shards).items():
                _put(model, name, places, part, shards)
                done.add(name)
    _complete(model, source)
    for module in model.modules():
        module._buffers = {key: b if b is None else b.to(shards.device) for key, b in module._buffers.items()}
    return model.eval()


def _tensors(source: str | Path, opened: ExitStack, revision: str | None) -> dict[str, Any]:
    """Return name in the files → a slice that reads nothing yet."""
    index = cached_file(source, SAFE_WEIGHTS_INDEX_NAME, revision=revision, _raise_exceptions_for_missing_entries=False)
    if index is None:
        files = [cached_file(source, SAFE_WEIGHTS_NAME, revision=revision)]
    else:
        files, _ = get_checkpoint_shard_files(source, index, revision=revision)
    tensors: dict[str, Any] = {}
    for file in files:
        handle = opened.enter_context(safe_open(file, framework="pt"))
        tensors |= {key: handle.get_slice(key) for key in handle.keys()}  # noqa: SIM118 (it is no mapping)
    return dict(sorted(tensors.items(), key=lambda item: dot_natural_key(item[0])))


@contextmanager
def _parameters_without_values() -> Iterator[None]:
    """Create modules inside with parameters on the meta device, and buffers as they make them."""
    original = nn.Module.register_parameter

    def register(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        original(self, name, param)
        if param is not None:
            self._parameters[name] = type(param)(param.to("meta"), requires_grad=False)

    nn.Module.register_parameter = register  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]


def _origins(model: PreTrainedModel, tensors: Mapping[str, Any]) -> dict[str, _Origin]:
    """Map the model's names to tensors of the files, by transformers' own rules of renaming and conversion."""
    mapping = get_model_conversion_mapping(model) or []
    renamings = [each for each in mapping if isinstance(each, WeightRenaming)]
    converters = [each for each in mapping if isinstance(each, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    known = model.state_dict()
    origins: dict[str, _Origin] = {}
    for key in tensors:
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, known)
        if name not in known and key in known:
            name, pattern = rename_source_key(key, [], [], model.base_model_prefix, known)
        if name in known:
            origin = origins.setdefault(name, _Origin([], None if pattern is None else by_pattern[pattern]))
            origin.parts.append((key, pattern or key))
    return origins


def _places(model: nn.Module) -> list[list[str]]:
    """List the names of every parameter and saved buffer; several where it is tied."""
    names: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), []).append(name)
    return list(names.values())


def _complete(model: nn.Module, source: str | Path) -> None:
    """Refuse a model some of whose parameters the files do not have; buffers are as the constructor made them."""
    if missing := sorted(name for name, parameter in model.named_parameters() if parameter.is_meta):
        raise FuncattribError(
            f"{source} lacks {len(missing)} weights of {type(model).__name__}, among them {missing[0]}\n"
            "give a checkpoint saved with its language-model head, or load it without `shard_params`"
        )


def _dtypes(model: PreTrainedModel, dtype: Any) -> Any:
    """Return a function from a parameter's name to its dtype: some models keep a few in float32."""
    plan = model._get_dtype_plan(dtype)
    found = build_glob_alternation(list(plan))[0] if plan else None
    dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    return lambda name: torch.float32 if found is not None and found.search(name) else dtypes[name]


def _read(
    model: PreTrainedModel,
    name: str,
    origin: _Origin,
    tensors: Mapping[str, Any],
    layers: Mapping[str, Layer],
    wanted: Callable[[str], torch.dtype],
    shards: Shards,
) -> dict[str, _Part]:
    """Read this rank's part of a weight; of several, where one conversion makes them together."""
    whole = model.state_dict()
    gathers, device = shards.gathers, shards.device

    def span(target: str) -> slice:
        shape = whole[target].shape
        parameter = len(shape) and not isinstance(
            _holder(model, target)[0]._buffers.get(target.rpartition(".")[2]), Tensor
        )
        return slice(*row_range(shape[0], gathers.size, gathers.rank)) if parameter else slice(None)

    def check(target: str, shape: Any) -> None:
        turned = target in layers and layers[target].turned and not layers[target].saved
        expected = tuple(whole[target].shape)[:: -1 if turned else 1]
        if tuple(shape) != expected:
            raise FuncattribError(
                f"expected {target} of shape {expected} in the checkpoint, found {tuple(shape)}\n"
                "give a checkpoint that belongs to its config.json"
            )

    def part(target: str, value: Any) -> _Part:
        if target in layers:
            layer = layers[target]
            return _Part(quantised_rows(layer, value, wanted(target), gathers, device), layer.coding)
        # A copy: what a slice gives lies in the file's pages.
        rows = (value[span(target)] if whole[target].ndim else value[...]).clone()
        return _Part(rows.to(wanted(target)))

    if origin.converter is None:
        (key, _) = origin.parts[0]
        if name in layers and layers[name].saved:
            blocks, coding = saved_blocks(layers[name], key, tensors, gathers, device)
            check(name, coding.shape)
            return {name: _Part(blocks, coding)}
        check(name, tensors[key].get_shape())
        return {name: part(name, tensors[key])}
    converter = copy.deepcopy(origin.converter)
    by_expert = _by_expert(converter)
    counted: dict[str, int] = {}
    for key, pattern in origin.parts:
        number = counted[pattern] = counted.get(pattern, -1) + 1
        mine = not by_expert or number in range(*span(name).indices(whole[name].shape[0]))
        if mine:
            converter.add_tensor(name, key, pattern, lambda key=key: tensors[key][...])  # type: ignore[arg-type]
    if not converter.collected_tensors:
        return {name: _Part(torch.empty(0, *whole[name].shape[1:], dtype=wanted(name)))}
    made = converter.convert(name, model=model, config=model.config)
    values = {target: value[0] if isinstance(value, list) else value for target, value in made.items()}
    if by_expert:
        check(name, (whole[name].shape[0], *values[name].shape[1:]))
        return {target: _Part(value.to(wanted(target))) for target, value in values.items()}
    for target, value in values.items():
        check(target, value.shape)
    return {target: part(target, value) for target, value in values.items()}


def _by_expert(converter: WeightConverter) -> bool:
    """Return whether a conversion of some experts' tensors gives those experts' rows of the whole."""
    first, *rest = converter.operations
    stacked = isinstance(first, MergeModulelist) and first.dim == 0
    return stacked and all(isinstance(one, Concatenate) and one.dim > 0 for one in rest)


def _holder(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    prefix, _, key = name.rpartition(".")
    return model.get_submodule(prefix), key


def _put(model: nn.Module, name: str, places: list[list[str]], part: _Part, shards: Shards) -> None:
    """Set the part in every place of the parameter; a buffer or a single number as it is."""
    rows, coding = part
    module, key = _holder(model, name)
    if key in module._buffers:
        module._buffers[key] = rows
        return
    shape = module.get_parameter(key).shape
    if not len(shape):
        leaf: Tensor = rows.to(shards.device)
    else:
        kept = rows.to("cpu" if shards.offload else shards.device)
        if shards.offload and shards.device.type == "cuda":
            kept = kept.pin_memory()
        of = tuple(shape) if coding is None else (coding.blocks, *rows.shape[1:])
        sharded = Sharded(kept, of, shards.gathers, shards.device)
        leaf = Stored(sharded if coding is None else ShardedQuantised(sharded, coding))
    parameter = nn.Parameter(leaf, requires_grad=False)
    for place in next(names for names in places if name in names):
        holder, attribute = _holder(model, place)
        holder._parameters[attribute] = parameter

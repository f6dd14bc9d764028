"""The quantised layers of a model, and this rank's blocks of their values.

    rows of a float weight in the files → the numbers of this rank's blocks → their codes
    codes and scales in the files       → this rank's

transformers' own quantiser chooses the layers, so that they are those of the unsharded model: linear ones and
``Conv1D`` (turned around to (out, in)), but for the head, tied weights and what its settings leave out.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import AutoHfQuantizer

from funcattrib.errors import FuncattribError
from funcattrib.models.skeleton import is_quantised
from funcattrib.weights.sharded import Gathers, row_range
from funcattrib.weights.sharded_quantised import QuantFormat, in_blocks, quantise

_BLOCK = 64  # numbers with one scale in four bits, as ``Params4bit`` has it


class Layer(NamedTuple):
    """A quantised layer's weight.

    Attributes:
        coding: of codes that are made here; what the files have says its own.
        turned: whether a float weight in the files is (in, out).
        saved: whether the files have codes.
    """

    coding: QuantFormat
    turned: bool
    saved: bool


def saved_settings(config: PretrainedConfig) -> Any:
    """Return the quantisation settings of a checkpoint quantised by bitsandbytes; None of one in floating point.

    Raises:
        FuncattribError: codes of another kind.
    """
    text = config.get_text_config(decoder=True)
    saved = getattr(config, "quantization_config", None) or getattr(text, "quantization_config", None)
    if saved is None:
        return None
    settings = saved if isinstance(saved, dict) else saved.to_dict()
    method = str(getattr(settings.get("quant_method"), "value", settings.get("quant_method")))
    if method != "bitsandbytes" and not (settings.get("load_in_8bit") or settings.get("load_in_4bit")):
        raise FuncattribError(
            "expected a checkpoint in floating point or quantised by bitsandbytes with `shard_params`, found "
            f"{method}\ngive the checkpoint before quantisation, with `precision` int8 or int4 if it is too large"
        )
    return saved


def quantised_layers(model: PreTrainedModel, settings: Any, saved: bool, dtype: torch.dtype) -> dict[str, Layer]:
    """Find quantised layers by the names of their weights; in the model they become plain linear layers, without
    values.

    Args:
        settings: of bitsandbytes, as transformers has them.
        saved: whether the files have codes.
        dtype: that the model is loaded in.
    """
    quantiser = AutoHfQuantizer.from_config(settings, pre_quantized=saved)
    quantiser.validate_environment(device_map=None)
    quantiser.preprocess_model(model, dtype=dtype, device_map=None)
    eight = quantiser.quantization_config.load_in_8bit
    found = [(name, module) for name, module in model.named_modules() if is_quantised(module)]
    layers: dict[str, Layer] = {}
    for name, module in found:
        shape = (module.out_features, module.in_features)
        kind, block = ("int8", shape[1]) if eight else (quantiser.quantization_config.bnb_4bit_quant_type, _BLOCK)
        plain = nn.Linear(shape[1], shape[0], module.bias is not None, device="meta", dtype=dtype)
        model.set_submodule(name, plain.requires_grad_(False))
        turned = issubclass(module.source_cls, Conv1D)
        layers[f"{name}.weight"] = Layer(QuantFormat(kind, shape, dtype, block), turned, saved)
    return layers


def quantised_rows(layer: Layer, weight: Any, dtype: torch.dtype, gathers: Gathers, device: torch.device) -> Tensor:
    """Quantise this rank's blocks of a float weight.

    Args:
        weight: as the files have it, or a slice that reads nothing yet.
        dtype: that it is quantised from.
        device: where it is quantised.
    """
    first, last = layer.coding.numbers(gathers.size, gathers.rank)
    width = layer.coding.shape[1]
    rows = slice(first // width, -(-last // width))
    part = (weight[:, rows].T if layer.turned else weight[rows]).to(device, dtype)
    skipped = rows.start * width
    return quantise(part.reshape(-1)[first - skipped : last - skipped], layer.coding)


def saved_blocks(
    layer: Layer, key: str, tensors: Mapping[str, Any], gathers: Gathers, device: torch.device
) -> tuple[Tensor, QuantFormat]:
    """Read this rank's blocks of quantised values that the files have, and their format.

    Args:
        key: of the codes in the files.
        tensors: of the files, as slices that read nothing yet.
    """
    coding, codes = layer.coding, tensors[key]
    if coding.kind == "int8":
        rows = slice(*row_range(coding.blocks, gathers.size, gathers.rank))
        scale = tensors[f"{key.removesuffix('weight')}SCB"][rows]
        return in_blocks(codes[rows], scale, coding), coding
    from bitsandbytes.functional import QuantState, dequantize_blockwise

    stats = {name: tensors[name][...] for name in tensors if name.startswith(f"{key}.")}  # a few bytes for a block
    state = QuantState.from_dict(stats, device=device)
    coding = QuantFormat(state.quant_type, tuple(state.shape), state.dtype, state.blocksize)
    scales = dequantize_blockwise(state.absmax, state.state2) + state.offset if state.nested else state.absmax
    first, last = row_range(coding.blocks, gathers.size, gathers.rank)
    rows_of_block = coding.code_bytes // codes[:0].element_size()
    part = codes[first * rows_of_block : last * rows_of_block].to(device)
    return in_blocks(part, scales[first:last], coding), coding

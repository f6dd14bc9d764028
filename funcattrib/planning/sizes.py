"""The sizes that costs depend on, read off a model's configuration: it is built without memory for its weights."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from funcattrib.errors import FuncattribError
from funcattrib.models.selection import choose
from funcattrib.models.task import require_causal_config
from funcattrib.transforms.leaf_shapes import is_stack, sides

_ACTIVE = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k_experts")


class Matrix(NamedTuple):
    """A weight matrix of a block, or a stack of experts' matrices.

    Attributes:
        rows, columns: o and i; of each expert in a stack.
        copies: matrices in the stack, else 1.
        active: of which a token passes through.
        attributed: whether its gradient is read.
    """

    name: str
    rows: int
    columns: int
    copies: int = 1
    active: int = 1
    attributed: bool = True

    @property
    def parameters(self) -> int:
        """Return the parameters of all experts."""
        return self.copies * self.rows * self.columns


class Sizes(NamedTuple):
    """A causal language model in numbers.

    Attributes:
        parameters: all, tied ones once.
        matrices: of the blocks.
        vocabulary, hidden: sides of the head.
        attention: width of all heads together, H · D; 0 without attention.
        layers: blocks.
    """

    parameters: int
    matrices: tuple[Matrix, ...]
    vocabulary: int
    hidden: int
    attention: int
    layers: int

    @property
    def body(self) -> int:
        """Return the parameters of the blocks' matrices."""
        return sum(matrix.parameters for matrix in self.matrices)


def sizes_of(
    config: PretrainedConfig,
    modules: Iterable[str] | None = None,
    exclude: Iterable[str] = (),
    *,
    trust_remote_code: bool = False,
) -> Sizes:
    """Read the sizes of the model that a configuration describes.

    Args:
        modules, exclude: which parameters are attributed, as in ``functionalize``. Of those, matrices in the blocks
            count; what else is chosen (the head, norms) is left out of the estimate.

    Raises:
        FuncattribError: no causal language model; globs that match nothing.

    Example:
        >>> from transformers import GPTNeoXConfig
        >>> sizes = sizes_of(GPTNeoXConfig(hidden_size=128, num_hidden_layers=6, num_attention_heads=4,
        ...     intermediate_size=512, vocab_size=50304))
        >>> sizes.parameters, sizes.body, len(sizes.matrices), sizes.attention
        (14067712, 1179648, 24, 128)
    """
    require_causal_config(config, config.name_or_path or type(config).__name__)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except ValueError as error:
        raise FuncattribError(
            f"expected a causal language model's configuration, found {type(config).__name__}\ngive another `model`"
        ) from error
    text = config.get_text_config()
    chosen = choose(model, list(modules) if modules else None, exclude)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    body = choose(model)
    head = model.get_output_embeddings()
    vocabulary, hidden = head.weight.shape if head is not None else (text.vocab_size, text.hidden_size)
    heads = getattr(text, "num_attention_heads", None) or 0
    return Sizes(
        parameters=sum(tensor.numel() for tensor in model.parameters()),
        matrices=tuple(_matrix(name, shapes[name], name in chosen, text) for name in shapes if name in body),
        vocabulary=int(vocabulary),
        hidden=int(hidden),
        attention=heads * (getattr(text, "head_dim", None) or text.hidden_size // heads) if heads else 0,
        layers=int(text.num_hidden_layers),
    )


def _matrix(name: str, shape: tuple[int, ...], attributed: bool, config: Any) -> Matrix:
    rows, columns = sides(name, shape)
    if not is_stack(name, shape):
        return Matrix(name, rows, columns, attributed=attributed)
    active = next((found for key in _ACTIVE if isinstance(found := getattr(config, key, None), int)), shape[0])
    return Matrix(name, rows, columns, shape[0], min(active, shape[0]), attributed)

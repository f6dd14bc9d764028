"""The cost model of a token, a row, a device's memory and a gathered layer. ``docs/scaling.md`` explains it.

With matrices (o, i) of which a token passes through n, T tokens a document, V words, projections to k:

    blocks       forward 2 o i n, gradient of the input 2 o i n; the weights' own gradients are never formed
    head         2 V d for the logits, 2 V d for the gradient of the hidden states
    attention    forward 2 T HD a layer (two products, causal), backward 5 T HD (five)
    reading      2 k (o + i) n + 2 k² n of each attributed matrix; 2 o i n where whole gradients are kept

FLOPs count a multiplication and an addition as two.
"""

from collections.abc import Iterable
from typing import NamedTuple

from funcattrib.planning.sizes import Matrix, Sizes

ACTIVATIONS = 1.25
"""Numbers that a token leaves until the backward pass, per output and input of a block's matrices (measured)."""

STORED = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}
"""Bytes of a number in a store's row."""
_SCALE = 4  # of an int8 row
_WEIGHT = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0, "int8": 1.0, "int4": 0.5 + 4 / 64}  # nf4: a scale for 64 weights
_OTHER = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0, "int8": 2.0, "int4": 2.0}  # what is not quantised
_CHUNK = {"cpu": 0, "cuda": 2**28}  # logits in memory at once, and at least 128 tokens'
_CHUNK_TOKENS = 128
PROCESS = {"cpu": 5e8, "cuda": 0.0}
"""Bytes of Python, torch and transformers themselves, by kind of device (measured)."""
PRECISIONS = tuple(_WEIGHT)


class Flops(NamedTuple):
    """FLOPs of one token."""

    blocks: float
    head: float
    attention: float
    readout: float

    @property
    def all(self) -> float:
        """Return the sum."""
        return sum(self)


class Memory(NamedTuple):
    """Bytes on one device.

    Attributes:
        weights: kept throughout.
        working: weights that are gathered, dequantised or converted for an operation.
        activations: of a batch, until the backward pass.
        logits: the chunk of the head.
        rows: of a batch.
        process: what the program takes before anything is loaded.
    """

    weights: float
    working: float
    activations: float
    logits: float
    rows: float
    process: float

    @property
    def all(self) -> float:
        """Return the sum."""
        return sum(self)


def flops_per_token(sizes: Sizes, length: float, k: int) -> Flops:
    """Compute FLOPs of forward, activation backward and reading, for a token of a document of ``length`` tokens.

    Args:
        k: coordinates a side of the projections; 0 for whole gradients.

    Example:
        >>> sizes = Sizes(10_000, (Matrix("w", 20, 10),), vocabulary=100, hidden=10, attention=10, layers=1)
        >>> flops_per_token(sizes, length=8, k=4)
        Flops(blocks=800, head=4000, attention=560, readout=272)
    """
    active = [(m.rows * m.columns * m.active, m) for m in sizes.matrices]
    return Flops(
        blocks=4 * sum(product for product, _ in active),
        head=4 * sizes.vocabulary * sizes.hidden,
        attention=7 * length * sizes.attention * sizes.layers,
        readout=sum(_readout(m, product, k) for product, m in active if m.attributed),
    )


def row_width(matrices: Iterable[Matrix], k: int) -> int:
    """Count the numbers in a row: Σ min(k, o) min(k, i) over attributed matrices, every expert's; k = 0 keeps them
    whole.

    Example:
        >>> row_width([Matrix("w", 20, 10), Matrix("small", 3, 10)], k=4)
        28
    """
    return sum(m.copies * _side(m.rows, k) * _side(m.columns, k) for m in matrices if m.attributed)


def row_bytes(width: int, dtype: str) -> int:
    """Compute the bytes of a stored row.

    Example:
        >>> row_bytes(6144, "float16"), row_bytes(6144, "int8")
        (12288, 6148)
    """
    return width * STORED[dtype] + (_SCALE if dtype == "int8" else 0)


def weight_bytes(sizes: Sizes, precision: str) -> float:
    """Compute the bytes of all parameters; int8 and int4 hold the blocks' linear layers, the others are in bfloat16
    then.
    """
    return _body(sizes, precision) + (sizes.parameters - sizes.body) * _OTHER[precision]


def memory(
    sizes: Sizes, precision: str, batch: int, documents: float, width: int, *, shards: int = 1, device: str = "cuda"
) -> Memory:
    """Compute the bytes on a device that computes batches of ``batch`` tokens in ``documents`` documents.

    Args:
        shards: devices that the parameters are divided over; with more than one, two layers are gathered at a time.
        device: ``cuda`` or ``cpu``; on a GPU the head takes larger chunks.
    """
    head = sizes.vocabulary * sizes.hidden
    largest = max((m.rows * m.columns * m.active for m in sizes.matrices), default=0)
    of_head = 0.0 if precision == "fp32" else 4.0 * head  # it computes in float32
    of_body = largest * _OTHER[precision] if precision in ("int8", "int4") else 0.0
    if shards > 1:
        of_head += head * _OTHER[precision]
        of_body += 2 * _body(sizes, precision) / sizes.layers
    passed = sum((m.rows + m.columns) * m.active for m in sizes.matrices)
    chunk = min(batch, max(_CHUNK_TOKENS, _CHUNK[device] // sizes.vocabulary))
    return Memory(
        weights=weight_bytes(sizes, precision) / shards,
        working=max(of_head, of_body),
        activations=ACTIVATIONS * passed * batch * _OTHER[precision],
        logits=4.0 * chunk * sizes.vocabulary,
        rows=4.0 * documents * width,
        process=PROCESS[device],
    )


def gathered_bytes(sizes: Sizes, precision: str, shards: int) -> float:
    """Compute the bytes that a device receives for one batch: the blocks in forward and again in backward, the others
    once.
    """
    return (2 * _body(sizes, precision) + (sizes.parameters - sizes.body) * _OTHER[precision]) * (shards - 1) / shards


def _body(sizes: Sizes, precision: str) -> float:
    """Compute the bytes of the blocks' matrices: bitsandbytes leaves stacks of experts as they are."""
    stacks = sum(m.parameters for m in sizes.matrices if m.copies > 1)
    return (sizes.body - stacks) * _WEIGHT[precision] + stacks * _OTHER[precision]


def _side(n: int, k: int) -> int:
    return n if k == 0 else min(n, k)


def _readout(m: Matrix, product: int, k: int) -> float:
    if k == 0:
        return 2 * product
    p, q = _side(m.rows, k), _side(m.columns, k)
    projected = (p * m.rows if m.rows > p else 0) + (q * m.columns if m.columns > q else 0)
    return 2 * m.active * (projected + p * q)

"""The time, storage and memory of a run, and its bottleneck.

    compute    tokens · FLOPs a token / (devices · FLOP/s · utilisation)
    gather     batches of a device · bytes gathered for one / bandwidth of its link      where parameters are sharded
    write      rows · bytes of one / bandwidth of the disk

The three overlap: a run takes as long as the longest of them.
"""

from typing import NamedTuple

from funcattrib.planning import cost
from funcattrib.planning.sizes import Sizes

UTILISATION = 0.7
"""Part of the FLOP/s of large matrix products that a run reaches; as measured on CPUs (``docs/scaling.md``)."""
TEXT = 4.5
"""Bytes of text a token, which a store keeps to show."""


class Run(NamedTuple):
    """The work of a run.

    Attributes:
        tokens: of the whole data set.
        length: mean tokens of a document.
        k: coordinates a side of each projected matrix; 0 for whole gradients.
        dtype: of the stored rows.
        precision: of the weights.
        batch: tokens of a batch on each device.
        shards: devices that one copy of the parameters is divided over.
    """

    tokens: float
    length: float = 512
    k: int = 16
    dtype: str = "float16"
    precision: str = "bf16"
    batch: int = 4096
    shards: int = 1


class Machine(NamedTuple):
    """The devices that compute a run.

    Attributes:
        devices: how many.
        flops: of one, FLOP/s of large matrix products.
        utilisation: the part of them that a run gets.
        speed: tokens a second that one device was measured at, in the place of both.
        link: bytes a second that a device receives.
        disk: bytes a second that all of them write together.
        device: ``cuda`` or ``cpu``.
    """

    devices: int = 1
    flops: float = 0.0
    utilisation: float = UTILISATION
    speed: float | None = None
    link: float = 5e10
    disk: float = 1e9
    device: str = "cuda"


class Estimate(NamedTuple):
    """The cost of a run; seconds and bytes.

    Attributes:
        flops: of a token.
        documents, width, row: rows, numbers and bytes in one.
        stored, text: bytes of all rows, and about those of the text kept with them.
        compute, gather, write: seconds, if each were alone.
        memory: of one device.
        enough: tokens a batch must have for a gather to take no longer than the batch; 0 without sharding.
    """

    flops: cost.Flops
    documents: float
    width: int
    row: int
    stored: float
    text: float
    compute: float
    gather: float
    write: float
    memory: cost.Memory
    enough: float

    @property
    def seconds(self) -> float:
        """Return the seconds of the whole run."""
        return max(self.compute, self.gather, self.write)

    @property
    def bottleneck(self) -> str:
        """Return the bottleneck: compute, gather or write."""
        times = {"compute": self.compute, "gather": self.gather, "write": self.write}
        return max(times, key=times.__getitem__)


def estimate(sizes: Sizes, run: Run, machine: Machine) -> Estimate:
    """Estimate the time, storage and memory of a run.

    Example:
        >>> from transformers import GPTNeoXConfig
        >>> from funcattrib.planning.sizes import sizes_of
        >>> sizes = sizes_of(GPTNeoXConfig(hidden_size=512, num_hidden_layers=6, num_attention_heads=8,
        ...     intermediate_size=2048, vocab_size=50304))
        >>> found = estimate(sizes, Run(tokens=1e9), Machine(devices=8, flops=4e14))
        >>> round(found.compute), found.row, round(found.stored / 1e9), found.bottleneck
        (85, 12288, 24, 'compute')
    """
    per_token = cost.flops_per_token(sizes, run.length, run.k)
    speed = machine.speed or machine.flops * machine.utilisation / per_token.all
    documents, width = run.tokens / run.length, cost.row_width(sizes.matrices, run.k)
    row = cost.row_bytes(width, run.dtype)
    received = cost.gathered_bytes(sizes, run.precision, run.shards) / machine.link  # seconds a batch
    return Estimate(
        flops=per_token,
        documents=documents,
        width=width,
        row=row,
        stored=documents * row,
        text=run.tokens * TEXT,
        compute=run.tokens / (machine.devices * speed),
        gather=run.tokens / (machine.devices * run.batch) * received,
        write=documents * (row + run.length * TEXT) / machine.disk,
        memory=cost.memory(
            sizes,
            run.precision,
            run.batch,
            max(1.0, run.batch / run.length),
            width,
            shards=run.shards,
            device=machine.device,
        ),
        enough=received * speed,
    )

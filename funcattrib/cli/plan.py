"""``funcattrib plan``: the cost of a run, before anything is computed."""

import logging
import math
from dataclasses import dataclass
from typing import Literal

from funcattrib.cli.flags import setting_names, with_flags
from funcattrib.cli.output import reports_on_stderr
from funcattrib.errors import FuncattribError
from funcattrib.runs.config import at_least

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """Estimate the time, storage and memory of a build from the model's configuration.

    No weights are needed. docs/scaling.md explains the cost model.
    """

    model: str
    """A hub id or a folder with a config.json."""
    tokens: float
    """Tokens of the data set, e.g. 1e9; --device-flops or --tokens-per-second is required too."""
    devices: int = 1
    """Devices that compute."""
    device_flops: float | None = None
    """FLOP/s of one device in large matrix products, e.g. 4e14; `python -m benchmarks.flops` measures them."""
    utilisation: float = 0.7
    """Part of --device-flops that a run gets."""
    tokens_per_second: float | None = None
    """Speed that a short build of this model had on one device, in the place of --device-flops."""
    mean_length: float = 512
    """Tokens of a document."""
    projection_dim: int = 16
    """Coordinates a side of each projected matrix; 0 keeps whole gradients."""
    dtype: Literal["float16", "bfloat16", "float32", "int8"] = "float16"
    """Type of the stored rows."""
    modules: tuple[str, ...] = ()
    """Globs of parameter names to attribute; by default the matrices of the model's blocks."""
    exclude: tuple[str, ...] = ()
    """Globs of parameter names to leave out."""
    precision: Literal["fp32", "bf16", "fp16", "int8", "int4"] = "bf16"
    """Type of the weights."""
    token_batch_size: int = 4096
    """Tokens in a batch of each device."""
    shard_params: bool = False
    """Divide the parameters over devices."""
    shard_ranks: int | None = None
    """Devices that one copy of the parameters is divided over; by default all."""
    link_bandwidth: float = 5e10
    """Bytes a second that a device receives from the others (5e10: 400 Gbit/s)."""
    disk_bandwidth: float = 1e9
    """Bytes a second that all devices write together."""
    device: Literal["cuda", "cpu"] = "cuda"
    """Kind of the devices: on a GPU the head takes larger chunks."""
    revision: str | None = None
    """Branch, tag or commit of the model on the hub."""
    trust_remote_code: bool = False
    """Run model code that comes with the checkpoint."""

    def __post_init__(self) -> None:
        """Check what a type cannot say."""
        at_least(self, tokens=1, devices=1, mean_length=1, projection_dim=0, token_batch_size=1)
        at_least(self, shard_ranks=2, link_bandwidth=1, disk_bandwidth=1, device_flops=1, tokens_per_second=1e-9)
        if not math.isfinite(self.tokens) or self.mean_length > self.tokens:
            raise FuncattribError(
                f"expected --tokens to be finite and at least --mean-length {self.mean_length:g}, found {self.tokens:g}"
            )
        if self.shard_ranks is not None and not self.shard_params:
            raise FuncattribError("--shard-ranks requires --shard-params")
        if self.shard_ranks is not None and self.devices % self.shard_ranks:
            raise FuncattribError(f"expected --shard-ranks to divide {self.devices} devices, found {self.shard_ranks}")
        if not 0 < self.utilisation <= 1:
            raise FuncattribError(f"expected --utilisation above 0 and at most 1, found {self.utilisation}")
        if (self.device_flops is None) == (self.tokens_per_second is None):
            raise FuncattribError(
                "--device-flops or --tokens-per-second is required"
                if self.device_flops is None
                else "--device-flops and --tokens-per-second cannot be combined"
            )


@reports_on_stderr
def run(config: Plan) -> int | None:
    """Print the estimate."""
    from funcattrib.models.limits import own_context
    from funcattrib.models.loading import load_config
    from funcattrib.planning import Machine, Run, sizes_of
    from funcattrib.planning.report import plan_lines

    trusted = config.trust_remote_code
    described = load_config(config.model, revision=config.revision, trust_remote_code=trusted)
    sizes = sizes_of(described, config.modules, config.exclude, trust_remote_code=trusted)
    if (context := own_context(described)) is not None and config.mean_length > context:
        log.warning(
            "--mean-length %s is longer than the model's context of %s tokens: a run stops at such documents, or cuts "
            "them with --truncation; give the mean length after truncation",
            *(f"{config.mean_length:g}", f"{context:,}"),
        )
    asked = Run(
        tokens=config.tokens,
        length=config.mean_length,
        k=config.projection_dim,
        dtype=config.dtype,
        precision=config.precision,
        batch=config.token_batch_size,
        shards=(config.shard_ranks or config.devices) if config.shard_params else 1,
    )
    machine = Machine(
        devices=config.devices,
        flops=config.device_flops or 0.0,
        utilisation=config.utilisation,
        speed=config.tokens_per_second,
        link=config.link_bandwidth,
        disk=config.disk_bandwidth,
        device=config.device,
    )
    print(with_flags("\n".join(plan_lines(sizes, asked, machine)), setting_names(Plan)))
    return None

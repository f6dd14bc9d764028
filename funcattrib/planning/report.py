"""The cost of a run, in lines for people."""

from collections.abc import Iterator

from funcattrib.planning.cost import PRECISIONS
from funcattrib.planning.estimate import Estimate, Machine, Run, estimate
from funcattrib.planning.sizes import Sizes

_BOUND = {
    "compute": "compute: more or faster devices make it shorter",
    "gather": "gathering parameters: use a larger `token_batch_size`, or `precision` int8 or int4",
    "write": "writing rows: use a smaller `projection_dim` or `dtype`, or `funcattrib score`, which stores none",
}


def plan_lines(sizes: Sizes, run: Run, machine: Machine) -> list[str]:
    """Format the estimate of one run, and the memory of a device by precision."""
    found = estimate(sizes, run, machine)
    return [*_model(sizes, found), *_times(run, machine, found), *_storage(run, found), *_memory(sizes, run, machine)]


def amount(value: float, unit: str = "") -> str:
    """Format a number with three digits and a prefix for thousands.

    Example:
        >>> amount(12_288, "B"), amount(1.5e12), amount(950)
        ('12.3 KB', '1.5 T', '950')
    """
    prefixes = ["", "K", "M", "G", "T", "P", "E"]
    at = 0
    while at < len(prefixes) - 1 and abs(value) >= 999.5:
        value, at = value / 1000, at + 1
    return f"{value:.3g} {prefixes[at]}{unit}".rstrip()


def duration(seconds: float) -> str:
    """Format seconds in the unit that reads best.

    Example:
        >>> duration(85), duration(7 * 3600), duration(4e8)
        ('85 s', '7 hours', '12.7 years')
    """
    for least, length, name in (
        (2 * 31_557_600, 31_557_600, "years"),
        (2 * 86400, 86400, "days"),
        (7200, 3600, "hours"),
        (120, 60, "minutes"),
    ):
        if seconds >= least:
            return f"{seconds / length:.3g} {name}"
    return f"{seconds:.3g} s"


def _model(sizes: Sizes, found: Estimate) -> Iterator[str]:
    read = [matrix for matrix in sizes.matrices if matrix.attributed]
    attributed = sum(matrix.parameters for matrix in read)
    counts = f"{amount(sizes.parameters)} parameters, {amount(attributed)} of them attributed, in {len(read)} weights"
    yield f"model       {counts}"
    parts = ", ".join(f"{name} {amount(value)}" for name, value in found.flops._asdict().items())
    yield f"work        {amount(found.flops.all, 'FLOP')} a token: {parts}"


def _times(run: Run, machine: Machine, found: Estimate) -> Iterator[str]:
    of = f"{machine.devices} device{'' if machine.devices == 1 else 's'}"
    used = f"{amount(machine.flops, 'FLOP/s')} each, {machine.utilisation:.0%} used"
    speed = f"{machine.speed:,.0f} tokens/s each" if machine.speed else used
    yield f"time        {duration(found.seconds)}, {amount(run.tokens / found.seconds)} tokens/s"
    yield f"            bound by {_BOUND[found.bottleneck]}"
    yield f"  compute   {duration(found.compute)} on {of}, {speed}"
    if run.shards > 1:
        yield (
            f"  gather    {duration(found.gather)} over links of {amount(machine.link, 'B/s')}; no longer than compute "
            f"from {found.enough:,.0f} tokens a batch, here {run.batch:,}"
        )
    yield f"  write     {duration(found.write)} at {amount(machine.disk, 'B/s')} for all"


def _storage(run: Run, found: Estimate) -> Iterator[str]:
    rows = f"{found.documents:,.0f} rows of {found.width:,} numbers in {run.dtype}, {amount(found.row, 'B')} each"
    yield f"storage     {amount(found.stored, 'B')}: {rows}"
    yield f"            and about {amount(found.text, 'B')} of text to show"


def _memory(sizes: Sizes, run: Run, machine: Machine) -> Iterator[str]:
    """Yield a line for each precision: parameters whole on every device, and divided."""
    shards = run.shards if run.shards > 1 else machine.devices
    right = f"; right: `shard_params` over {shards}" if shards > 1 else ""
    yield f"memory      of a device, batches of {run.batch:,} tokens{right}"
    names = ("weights", "working", "batch", "in all")
    yield f"{'':18}" + "".join(f"{name:>10}" for name in (*names, *(names if shards > 1 else ())))
    for precision in PRECISIONS:
        columns: list[float] = []
        for over in sorted({1, shards}):
            of = estimate(sizes, run._replace(precision=precision, shards=over), machine).memory
            columns += [of.weights, of.working, of.activations + of.logits + of.rows, of.all]
        mark = "  <" if precision == run.precision else ""
        yield f"{'':12}{precision:6}" + "".join(f"{amount(value, 'B'):>10}" for value in columns) + mark

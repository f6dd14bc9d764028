"""``funcattrib check``: a test that a model's gradients do not depend on their batch."""

from dataclasses import dataclass, field

from funcattrib.cli.build import Build
from funcattrib.cli.flags import setting_names, with_flags
from funcattrib.cli.output import reports_on_stderr
from funcattrib.cli.settings import ModelConfig


@dataclass(frozen=True)
class Check:
    """Check that a model's gradients do not depend on their batch.

    One batch is computed twice, permuted, and one by one.
    """

    model: ModelConfig
    projection_dim: int = 16
    """Coordinates a side of each projected matrix; 0 keeps whole gradients."""
    modules: tuple[str, ...] = ()
    """Globs of parameter names to attribute; by default the matrices of the model's blocks."""
    lengths: tuple[int, ...] = field(default=(48, 17, 64, 5))
    """Lengths in tokens of the documents in the batch."""


@reports_on_stderr
def run(config: Check) -> int | None:
    """Print the differences; 1 where rows depend on their batch."""
    from funcattrib.cli.load import load_from
    from funcattrib.runs.check import check_model

    loaded = load_from(config.model)
    verdict = check_model(loaded.model, config.lengths, config.projection_dim, config.modules or None)
    print(with_flags("\n".join(verdict.lines()), setting_names(Build)))  # its advice is for a build
    return None if verdict.passed else 1

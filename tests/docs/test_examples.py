"""Every example runs as it stands, is short enough to read, and finds what it says that it finds."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.waiting import OUTER_LIMIT

pytestmark = pytest.mark.slow

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]

# What the last line of an example prints, and how much it must be at least.
FIGURES = {
    "custom_loss": ("sequences whose nearest is their twin", 0.9),
    "digits": ("mislabelled images among the 100 first", 0.75),
    "grpo_rewards": ("prompts with a fooled grader among the 10 first", 0.8),
    "heads": ("heads found of those that are heard", 1.0),
    "jax_flax": ("queries whose twin is among the 3 first", 0.8),
    "less_selection": ("selected documents of the task", 0.8),
    "poison_training": ("precision at 24", 0.8),
    "quickstart": ("documents found that state the asked fact", 0.8),
    "torchrun_sharded": ("precision at 24", 0.8),
    "trainer_collection": ("documents found of the question's kind", 0.8),
    "vision": ("mislabelled images among the 100 first", 0.5),
}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example(example, tmp_path) -> None:
    assert len(example.read_text(encoding="utf-8").splitlines()) < 80
    if "jax" in example.stem:
        pytest.importorskip("flax", reason="flax is not installed; it comes with the dev extra")
    what, least = FIGURES[example.stem]
    done = subprocess.run(
        [sys.executable, *(TORCHRUN if "torchrun" in example.stem else []), example],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=OUTER_LIMIT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "performance drop" not in done.stderr
    found = re.fullmatch(rf"{re.escape(what)}: ([\d.]+) \(chance: ([\d.]+)\)", done.stdout.splitlines()[-1])
    assert found, done.stdout
    figure, chance = map(float, found.groups())
    assert figure >= least > 3 * chance


def test_every_figure_has_its_example() -> None:
    assert set(FIGURES) == {example.stem for example in EXAMPLES}

"""A dated result file: task, hardware, versions, commit, figures, command."""

import datetime
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
_LIBRARIES = ("torch", "transformers", "numpy")


def write_result(name: str | None, *, task: str, figures: Mapping[str, Any], device: str = "cpu") -> str:
    """Print the result, and write it to ``results/DATE-NAME.md`` where a name is given."""
    text = "\n".join(["# " + task, "", *header(device), "", *table(figures)])
    print(text)
    if name:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{datetime.date.today()}-{name}.md").write_text(text + "\n", encoding="utf-8")
    return text


def header(device: str = "cpu") -> list[str]:
    """Date, commit, machine, versions and command, a line each."""
    libraries = ", ".join(f"{library} {version(library)}" for library in _LIBRARIES)
    changed = " with changes" if _git("status", "--porcelain", "-uno", "funcattrib") else ""
    return [
        f"* date: {datetime.date.today()}",
        f"* commit: {_git('rev-parse', '--short', 'HEAD')}{changed}",
        f"* machine: {machine(device)}",
        f"* versions: Python {platform.python_version()}, {libraries}",
        f"* command: `{command()}`",
    ]


def machine(device: str = "cpu") -> str:
    """Processor and cores, and the GPU where one is used."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    processor = f"{os.cpu_count()} cores of {names[0] if names else platform.processor()}"
    return processor if device == "cpu" else f"{torch.cuda.get_device_name(device)}; {processor}"


def command() -> str:
    """The command that was run, without folders of this machine."""
    words = [Path(word).name if os.path.sep in word else word for word in sys.argv[1:]]
    return " ".join(["python -m", f"benchmarks.{Path(sys.argv[0]).stem}", *words])


def own_peak() -> float:
    """Megabytes that this process has held at most (``ru_maxrss`` would count what its parent held at the fork)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024 / 1e6


def table(figures: Mapping[str, Any]) -> list[str]:
    """Two columns of Markdown."""
    return ["| figure | value |", "|---|---|", *(f"| {name} | {value} |" for name, value in figures.items())]


def _git(*words: str) -> str:
    run = subprocess.run(["git", *words], capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    return run.stdout.strip()

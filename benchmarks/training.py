"""What collecting costs a training: transformers' Trainer with the callback against the same Trainer without.

    step      one optimizer step on a batch, forward to the callbacks behind it, median over all steps but each first
    writing   what follows at the epoch's end, divided by its steps
    memory    peak of a process of its own
    turns     funcattrib alone: one training that collects from every second step, the median of one kind of step
              over that of the other

Trainings with and without take turns in one process, so that the machine's drift cancels in the ratio. With
``--library funcattrib bergson``, run by a Python that has Bergson 2.5.1 too, its callback stands in the same table.

    python -m benchmarks.training [--size 14m] [--batch 4] [--steps 8] [--rounds 4] [--library funcattrib bergson]
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator

from benchmarks.inputs import PYTHIA, VOCABULARY, pythia
from benchmarks.report import own_peak, write_result

LIBRARIES = ("plain", "funcattrib", "bergson")


class Timer(TrainerCallback):
    """The last of the callbacks: seconds of each step, and of the epoch's end."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.writing = self._begun = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._begun = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.steps.append(time.perf_counter() - self._begun)
        self._begun = time.perf_counter()

    def on_epoch_end(self, *_: Any, **__: Any) -> None:
        self.writing = time.perf_counter() - self._begun


class EverySecond:
    """Steps to collect from: those with an even number."""

    def __contains__(self, step: int) -> bool:
        return step % 2 == 0


def train(library: str, a: argparse.Namespace, collected: Any = None) -> Timer:
    """One epoch of ``a.steps`` steps with a library's callback, or with none."""
    model = pythia(a.size).to(a.device)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(VOCABULARY, (a.batch * a.steps, a.tokens), generator=generator).tolist()
    data = Dataset.from_dict({"input_ids": ids, "labels": ids})
    timer, callbacks = Timer(), []
    with tempfile.TemporaryDirectory() as folder:
        if library == "funcattrib":
            import funcattrib as fa

            callbacks = [fa.GradientCollectorCallback(Path(folder) / "run", track_order=True, steps=collected)]
            prepare: Any = fa.prepare_for_gradient_collection
        elif library == "bergson":
            from bergson.huggingface import GradientCollectorCallback, prepare_for_gradient_collection

            callbacks = [
                GradientCollectorCallback(
                    Path(folder) / "run", projection_dim=16, use_optimizer_state=False, track_order=True
                )
            ]
            prepare = prepare_for_gradient_collection
        arguments = TrainingArguments(
            output_dir=f"{folder}/out",
            per_device_train_batch_size=a.batch,
            num_train_epochs=1,
            learning_rate=1e-4,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=a.device == "cpu",
            bf16=a.dtype == "bfloat16",
        )
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=data,
            data_collator=default_data_collator,
            callbacks=[*callbacks, timer],
        )
        if callbacks:
            prepare(trainer)
        trainer.train()
    return timer


def peak(library: str, words: list[str]) -> float:
    """Megabytes that a process of its own reaches."""
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.training", *words, "--memory-of", library],
        capture_output=True,
        text=True,
        check=True,
    )
    return float(run.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=PYTHIA, default="14m")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--turns", type=int, default=0, help="steps of a training that collects from every second")
    parser.add_argument("--library", choices=LIBRARIES[1:], nargs="+", default=["funcattrib"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--memory-of", choices=LIBRARIES, help="train once and print the peak alone")
    parser.add_argument("--out", help="name of the result file under benchmarks/results")
    a = parser.parse_args()
    if a.memory_of:
        train(a.memory_of, a)
        on_gpu = torch.cuda.max_memory_allocated() / 1e6 if a.device != "cpu" else 0.0
        print(on_gpu or own_peak())
        return

    if a.turns:
        steps = train("funcattrib", argparse.Namespace(**{**vars(a), "steps": a.turns}), EverySecond()).steps[2:]
        plain, ours = statistics.median(steps[::2]), statistics.median(steps[1::2])
        pairs = statistics.median(b / c for c, b in zip(steps[::2], steps[1::2], strict=True))
        figures = {
            "threads": torch.get_num_threads(),
            "steps of each kind": len(steps) // 2,
            "plain step, s (median)": f"{plain:.3f}",
            "collected step, s (median)": f"{ours:.3f}",
            "overhead, writing at the epoch's end not included": f"{100 * (ours / plain - 1):.1f} %",
            "the same as the median over neighbours": f"{100 * (pairs - 1):.1f} %",
        }
        task = f"Training Pythia-{a.size} on {a.batch} x {a.tokens} tokens a step, every second step collected from"
        write_result(a.out, task=task, figures=figures, device=a.device)
        return

    libraries = ["plain", *a.library]
    seconds: dict[str, list[float]] = {library: [] for library in libraries}
    writing: dict[str, list[float]] = {library: [] for library in libraries}
    whole: dict[str, list[float]] = {library: [] for library in libraries}  # seconds a step, writing included, by round
    for number in range(a.rounds):
        turn = number % len(libraries)
        for library in libraries[turn:] + libraries[:turn]:  # each goes first in its turn
            timer = train(library, a)
            seconds[library] += timer.steps[1:]
            writing[library].append(timer.writing / a.steps)
            whole[library].append(statistics.median(timer.steps[1:]) + timer.writing / a.steps)
    words = ["--size", a.size, "--batch", str(a.batch), "--tokens", str(a.tokens), "--steps", "4"]
    words += ["--device", a.device, "--dtype", a.dtype]
    memory = {library: peak(library, words) for library in libraries}
    figures = {
        "threads": torch.get_num_threads(),
        "plain step, s (median)": f"{statistics.median(seconds['plain']):.3f}",
        "plain peak memory, MB": round(memory["plain"]),
    }
    for library in a.library:
        ratios = [ours / plain for ours, plain in zip(whole[library], whole["plain"], strict=True)]
        figures |= {
            f"{library}: step, s (median)": f"{statistics.median(seconds[library]):.3f}",
            f"{library}: writing, s a step": f"{statistics.median(writing[library]):.4f}",
            f"{library}: **overhead, writing included**": f"{100 * (statistics.median(ratios) - 1):.1f} %",
            f"{library}: overhead of each round": ", ".join(f"{100 * (ratio - 1):.1f} %" for ratio in ratios),
            f"{library}: peak memory, MB": round(memory[library]),
            f"{library}: **memory over plain**": f"{100 * (memory[library] / memory['plain'] - 1):.1f} %",
        }
    task = f"Training Pythia-{a.size} on {a.batch} x {a.tokens} tokens a step with a callback that collects gradients"
    write_result(a.out, task=task, figures=figures, device=a.device)


if __name__ == "__main__":
    main()

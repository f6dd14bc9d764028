"""Everything there is to see on a GPU, in one run: correctness first, then figures, each in a dated file of its own.

What fails is named at the end, and does not keep the rest from running. ``--brief`` takes small models and few
documents: it shows that all of it runs.

    python -m benchmarks.cuda [--brief] [--device cuda]
"""

import argparse
import subprocess
import sys
import time

import torch

TESTS = [
    "tests/lift/test_devices.py",
    "tests/transforms/test_sketch.py",
    "tests/query/test_topk.py",
    "tests/query/test_faiss.py",
]


def commands(device: str, brief: bool) -> dict[str, list[str]]:
    """Name → the words behind ``python -m``."""
    small, large = ("14m", "14m") if brief else ("70m", "1b")
    few = ["--documents", "8", "--rounds", "1"] if brief else ["--documents", "256", "--rounds", "5"]
    build = ["benchmarks.build", "--device", device, *few]

    def out(name: str) -> list[str]:
        return [] if brief else ["--out", f"gpu-{name}"]

    return {
        "tests": ["pytest", "-q", "-rs", *TESTS],
        "products": ["benchmarks.flops", "--device", device, *out("flops")],
        "build, float32": [*build, "--size", small, "--token-batch-size", "16384", *out(f"build-{small}")],
        "build, bfloat16": [
            *[*build, "--size", large, "--token-batch-size", "8192", "--dtype", "bfloat16"],
            *out(f"build-{large}-bf16"),
        ],
        "scores": [
            *["benchmarks.score", "--device", device, "--size", small],
            *(["--rounds", "1", "--length", "128", "--queries", "1"] if brief else out("score")),
        ],
        "precisions": [
            *["benchmarks.precision", "--device", device, "--size", large, "--token-batch-size", "8192", *few],
            *["--precisions", "bf16", "int8", "int4", *out(f"precision-{large}")],
        ],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--brief", action="store_true")
    a = parser.parse_args()
    if a.device != "cpu" and not torch.cuda.is_available():
        print("expected a GPU, found none that torch sees; --device cpu --brief shows that the script runs")
        return 2
    failed = []
    for name, words in commands(a.device, a.brief).items():
        print(f"== {name}: python -m {' '.join(words)}", flush=True)
        start = time.monotonic()
        if subprocess.run([sys.executable, "-m", *words]).returncode:
            failed.append(name)
        print(f"== {name}: {time.monotonic() - start:.0f} s", flush=True)
    print(f"failed: {', '.join(failed)}" if failed else "all ran")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())

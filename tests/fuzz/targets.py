"""What is fuzzed: each target takes a copy of good inputs, damages it, and names the commands to run on it."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import NamedTuple

from tests.fuzz.damage import ODD, damage_bytes, damage_file, damage_json, plant
from tests.support import saved_runs, tiny

Command = Sequence[object]
SMALL = ("--projection-dim", "4", "--token-batch-size", "256")
QUERY = ("--text", "w1 w2 w3", "--top-k", "3")


class Attempt(NamedTuple):
    """Commands on damaged inputs.

    Attributes:
        commands: run one after the other.
        verify: a run whose last command must answer as the good one does, unless ``inspect --verify`` finds the damage
            (rows are too large to be hashed whenever they are read); None where the answer may be anything.
    """

    commands: Sequence[Command]
    verify: Path | None = None


Target = Callable[[Path, Path, Random], Attempt]
"""(good inputs, folder of its own, generator) → an attempt."""


def prepare(base: Path, run: Callable[[Command], tuple[int, str]]) -> None:
    """Make the good inputs: a model, data, a store, an unfinished run, checkpoints, and the answer of a query."""
    tiny.save_model(base / "model")
    rows = [{"text": text, "id": f"d{i}", "label": i % 3} for i, text in enumerate(tiny.texts(9))]
    tiny.write_jsonl(base / "d.jsonl", rows)
    build = ("--model", base / "model", "--dataset", base / "d.jsonl", *SMALL, "--rows-per-shard", "4")
    code, said = run(("build", base / "store", *build, "--normalizer", "adafactor"))
    assert code == 0, said
    shutil.copytree(base / "store", base / "unfinished")
    for shard in (base / "unfinished").rglob("*00002*"):
        shard.unlink()
    manifest = json.loads((base / "unfinished" / "manifest.json").read_text())
    if "complete" in manifest:
        manifest["complete"] = False
        (base / "unfinished" / "manifest.json").write_text(json.dumps(manifest))
    saved_runs.save_run(base / "training", rates=(1e-3,), steps=1)
    code, said = run(("query", "--index", base / "store", *QUERY))
    assert code == 0, said
    (base / "answer.txt").write_text(said)


def data(base: Path, here: Path, draw: Random) -> Attempt:
    """Data files of every format, with odd values and damaged bytes."""
    import datasets

    rows = [json.loads(line) for line in (base / "d.jsonl").read_text().splitlines()][: draw.randint(1, 5)]
    if draw.random() < 0.5:
        rows = [damage_json(row, draw) if draw.random() < 0.4 else row for row in rows]
    kind = draw.choice(("jsonl", "json", "csv", "txt", "parquet", "arrow", "folder"))
    file = here / f"data.{kind}"
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if kind == "jsonl":
        file.write_text(text)
    elif kind == "json":
        file.write_text(json.dumps(rows))
    elif kind in ("csv", "txt"):
        file.write_bytes(b"text,id\n" + text.encode("utf-8", "surrogatepass"))
    else:
        plain = datasets.Dataset.from_list([{"text": f"w{i} w2", "id": str(i)} for i in range(4)])
        if kind == "parquet":
            plain.to_parquet(str(file))
        else:
            plain.save_to_disk(str(here / "folder"))
            file = next((here / "folder").glob("*.arrow")) if kind == "arrow" else here / "folder"
    if draw.random() < 0.6:
        hit = draw.choice(sorted(each for each in file.rglob("*") if each.is_file())) if file.is_dir() else file
        hit.write_bytes(damage_bytes(hit.read_bytes(), draw))
    columns: Command = draw.choice(((), (), ("--prompt-column", "id"), ("--advantage-column", "label")))
    return Attempt([("build", here / "run", "--model", base / "model", "--dataset", file, *SMALL, *columns)])


def store(base: Path, here: Path, draw: Random) -> Attempt:
    """A finished store with one damaged file: a query fails, or answers as before."""
    shutil.copytree(base / "store", here / "store")
    files = sorted(each for each in (here / "store").rglob("*") if each.is_file())
    damage_file(draw.choice(files), draw)
    index: Command = draw.choice(((), (), ("--faiss", "Flat")))
    return Attempt([("inspect", here / "store"), ("query", "--index", here / "store", *QUERY, *index)], here / "store")


def unfinished(base: Path, here: Path, draw: Random) -> Attempt:
    """An unfinished run with one damaged file: the build fails, or ends with the rows that it would have had."""
    shutil.copytree(base / "unfinished", here / "run")
    files = sorted(each for each in (here / "run").rglob("*") if each.is_file())
    damage_file(draw.choice(files), draw)
    build = ("--model", base / "model", "--dataset", base / "d.jsonl", *SMALL, "--rows-per-shard", "4")
    again = ("build", here / "run", *build, "--normalizer", "adafactor")
    return Attempt([again, ("query", "--index", here / "run", *QUERY)], here / "run")


def flags(base: Path, here: Path, draw: Random) -> Attempt:
    """Odd values of flags, of every command that computes in seconds."""
    command = draw.choice(("build", "query", "inspect", "score", "reduce", "fit", "trackstar", "trak", "less", "merge"))
    names = (
        *("--projection-dim", "--token-batch-size", "--rows-per-shard", "--seed", "--dtype", "--precision", "--device"),
        *("--modules", "--exclude", "--normalizer", "--loss", "--loss-reduction", "--label-smoothing", "--max-length"),
        *("--top-k", "--show", "--text", "--faiss", "--nprobe", "--split", "--subset", "--fit-documents", "--state"),
        *("--prompt-column", "--completion-column", "--advantage-column", "--query-dataset", "--unit-norm", "--config"),
    )
    words: list[object] = [command]
    where = {"query": ("--index", base / "store"), "inspect": (base / "store",)}
    words += where.get(command, (here / "run", "--model", base / "model", "--dataset", base / "d.jsonl"))
    for _ in range(draw.randint(1, 4)):
        words.append(draw.choice(names))
        if draw.random() < 0.9:
            words.append(
                str(draw.choice((*ODD, "4", "1", "float16", "cpu", "*", "Flat", base / "d.jsonl", base / "store")))
            )
    return Attempt([[word for word in words if "\x00" not in str(word)]])


def config(base: Path, here: Path, draw: Random) -> Attempt:
    """A damaged config.yaml."""
    text = (base / "store" / "config.yaml").read_text()
    lines = text.splitlines()
    if draw.random() < 0.6:
        at = draw.randrange(len(lines))
        name = lines[at].partition(":")[0]
        lines[at] = f"{name}: {json.dumps(draw.choice(ODD))}" if draw.random() < 0.8 else f"{name} {draw.choice(ODD)}"
        written = "\n".join(lines).encode("utf-8", "surrogatepass")
    else:
        written = damage_bytes(text.encode(), draw)
    (here / "config.yaml").write_bytes(written)
    return Attempt([("build", "--config", here / "config.yaml", "--output.run", here / "run")])


def optimizer(base: Path, here: Path, draw: Random) -> Attempt:
    """Damaged files of a checkpoint's optimizer, or pickles in their place."""
    checkpoint = next((base / "training").iterdir())
    shutil.copytree(checkpoint, here / checkpoint.name)
    file = here / checkpoint.name / draw.choice(("optimizer.pt", "optimizer.pt", "trainer_state.json", "scheduler.pt"))
    if draw.random() < 0.2:
        plant(file, here / "mark")
    else:
        damage_file(file, draw)
    model = here / checkpoint.name
    build = ("build", here / "run", "--model", model, "--dataset", base / "d.jsonl", *SMALL)
    less = (
        "less",
        here / "less",
        "--checkpoints",
        model,
        "--dataset",
        base / "d.jsonl",
        "--query-dataset",
        base / "d.jsonl",
    )
    return Attempt([draw.choice(((*build, "--optimizer-state", model), (*less, "--projection-dim", "8")))])


def model(base: Path, here: Path, draw: Random) -> Attempt:
    """A model's folder with one damaged file, or pickled weights."""
    shutil.copytree(base / "model", here / "model")
    files = sorted(each for each in (here / "model").iterdir() if each.is_file())
    if draw.random() < 0.1:
        (here / "model" / "model.safetensors").unlink()
        plant(here / "model" / "pytorch_model.bin", here / "mark")
    else:
        damage_file(draw.choice(files), draw)
    return Attempt([("build", here / "run", "--model", here / "model", "--dataset", base / "d.jsonl", *SMALL)])


TARGETS: dict[str, Target] = {
    each.__name__: each for each in (data, store, unfinished, flags, config, optimizer, model)
}

"""Several processes at one run, under torchrun: what they make, and what remains when one of them is killed."""

import hashlib
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import load_from_disk
from safetensors.torch import load_file, save_file

import funcattrib as fa
from funcattrib.recipes.less import less
from funcattrib.recipes.trackstar import trackstar
from funcattrib.recipes.trak import trak
from funcattrib.runs import workload
from funcattrib.runs.reduce import reduce_gradients
from funcattrib.runs.score import score_gradients
from funcattrib.store import merge_stores, open_store, progress_files
from tests.support import cases, store_run, tiny
from tests.support.processes import start, torchrun
from tests.support.saved_runs import save_run
from tests.support.waiting import until

SETTINGS = {"projection_dim": 4, "rows_per_shard": 4, "token_batch_size": 48, "quiet": True}
FITTED = {**SETTINGS, "normalizer": "adafactor", "precondition": "parameter", "dtype": "float32"}


def records(count: int, seed: int) -> list[dict]:
    lengths = torch.randint(2, 12, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    ids = cases.batch(lengths, seed=seed)["input_ids"]
    return [{"input_ids": row[:n].tolist()} for row, n in zip(ids, lengths, strict=True)]


def everything(out: Path) -> None:
    """Every recipe that processes share, on one tiny model."""
    model, data, queries = cases.causal("gpt_neox"), records(23, 1), records(3, 2)
    fa.collect_gradients(model, data, path=out / "build", **SETTINGS)
    fa.fit_chain(model, data, path=out / "fit", **FITTED)
    fa.collect_gradients(model, data, path=out / "fitted", state=out / "fit", **FITTED)
    fa.fit_chain(model, data, path=out / "joint", **{**FITTED, "projection_dim": 2, "precondition": "all"})
    fa.collect_gradients(model, data, path=out / "tokens", granularity="token", **{**SETTINGS, "rows_per_shard": 30})
    reduce_gradients(model, queries, path=out / "query", **SETTINGS)
    score_gradients(model, data, path=out / "scores", query_data=queries, **SETTINGS)
    score_gradients(model, data, path=out / "best", query_stores=out / "query", top_k=5, **SETTINGS)
    trackstar(model, data, queries, path=out / "trackstar", mixing_rank=5, **SETTINGS)
    few = {"rows_per_shard": 4, "token_batch_size": 48, "quiet": True}
    trak([model], data, queries, path=out / "trak", sketch_dim=8, damping=0.1, **few)
    checkpoints = sorted((out.parent / "trained").iterdir())
    less(checkpoints, data, queries, path=out / "less", fraction=0.2, projection_dim=4, **few)


EVERYTHING = """
import sys
from pathlib import Path
import torch.distributed as dist
from tests.runs.test_processes import everything
dist.init_process_group("gloo")
everything(Path(sys.argv[1]))
dist.destroy_process_group()
"""

# Rank 1 ends in the middle of its second shard, as often as there are files to take away. Parts are saved at once.
KILLED = """
import os, signal, sys
from pathlib import Path
from funcattrib.cli.main import main
from funcattrib.runs import best_rows, fold, reduce, workload
fold._SAVE_EVERY = 0.0
lives, rows_of, seen = Path(sys.argv[1]), workload.rows_of, []
def killed(*args):
    seen.append(1)
    if os.environ["RANK"] == "1" and len(seen) == 2:
        for life in lives.iterdir():
            life.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
    return rows_of(*args)
workload.rows_of = reduce.rows_of = best_rows.rows_of = killed
sys.exit(main(sys.argv[2:]))
"""

# The process that writes what the others hand it ends after the first block.
KILLED_FITTING = """
import os, signal, sys
from funcattrib.cli.main import main
from funcattrib.runs import blockwise_fit
save, seen = blockwise_fit.save_tensors, []
def killed(*args):
    seen.append(1)
    if len(seen) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    save(*args)
blockwise_fit.save_tensors = killed
sys.exit(main(sys.argv[1:]))
"""

# Rank 1 is told to end in the middle of its second batch of a fit.
TERMINATED = """
import os, signal, sys
from funcattrib.cli.main import main
from funcattrib.weights import lockstep
compute, seen = lockstep._Rounds.compute, []
def told(*args):
    seen.append(1)
    if os.environ["RANK"] == "1" and len(seen) == 2:
        os.kill(os.getpid(), signal.SIGTERM)
    return compute(*args)
lockstep._Rounds.compute = told
sys.exit(main(sys.argv[1:]))
"""

# Two machines of one process each, without a shared folder.
APART = """
import os, sys
from pathlib import Path
import torch.distributed as dist
import funcattrib as fa
from tests.support import cases
from tests.runs.test_processes import FITTED, SETTINGS, records
os.environ["LOCAL_RANK"] = "0"
dist.init_process_group("gloo")
out = Path(sys.argv[1]) / f"machine{dist.get_rank()}"
fa.collect_gradients(cases.causal("gpt_neox"), records(23, 1), path=out / "run", **FITTED)
try:
    from funcattrib.recipes.trackstar import trackstar
    trackstar(cases.causal("gpt_neox"), records(5, 1), records(2, 2), path=out / "trackstar", **SETTINGS)
except fa.FuncattribError as error:
    (out / "error").write_text(str(error))
dist.destroy_process_group()
"""


def content(store: Path) -> str:
    """A hash of rows and examples."""
    whole = hashlib.sha256()
    for file in sorted([*store.glob("shards/*.npy"), *store.glob("examples/*"), *store.glob("best.parquet")]):
        whole.update(file.name.encode() + file.read_bytes())
    return whole.hexdigest()


@pytest.fixture
def one_thread():
    """As many threads as each process of a run has."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    tiny.save_model(folder / "model")
    tiny.write_jsonl(folder / "data.jsonl", [{"text": text} for text in tiny.texts(40)])
    return folder


def words(files: Path, run: Path) -> list[object]:
    model, data = files / "model", files / "data.jsonl"
    sizes = ["--projection-dim", 4, "--rows-per-shard", 4, "--token-batch-size", 64]
    return ["build", run, "--model", model, "--dataset", data, *sizes]


def test_what_is_made_does_not_depend_on_how_many_make_it(tmp_path: Path, one_thread: None) -> None:
    save_run(tmp_path / "trained")
    everything(tmp_path / "1")
    (tmp_path / "run.py").write_text(EVERYTHING)
    for processes in (2, 3):
        code, out = torchrun(processes, tmp_path / "run.py", tmp_path / str(processes))
        assert code == 0, out
        ours, theirs = tmp_path / "1", tmp_path / str(processes)
        for name in ("build", "tokens", "query", "scores", "best", "less"):
            assert content(ours / name) == content(theirs / name), name
        selected = [load_from_disk(each / "less/selected")["input_ids"][:] for each in (ours, theirs)]
        assert len(selected[0]) == 4
        assert selected[0] == selected[1]
        for fit in ("fit", "joint"):
            states = [open_store(each / fit).state() for each in (ours, theirs)]
            assert states[0].keys() == states[1].keys()
            for name, expected in states[0].items():
                tolerance = 1e-6 * float(expected.abs().max())
                torch.testing.assert_close(states[1][name], expected, rtol=1e-6, atol=tolerance)
        for name in ("fitted", "trackstar", "trak"):
            expected, found = (np.asarray(open_store(each / name).matrix()[:]) for each in (ours, theirs))
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max(), err_msg=name)
            assert open_store(ours / name).examples[:] == open_store(theirs / name).examples[:]
        left = [*theirs.rglob("progress*"), *theirs.rglob("fitting")]
        assert not left, "nothing unfinished is left"
        assert not list(theirs.rglob("lock"))


@pytest.mark.slow
def test_a_killed_rank_is_named_and_its_run_continued_by_fewer(tmp_path: Path, files: Path, funcattrib) -> None:
    (tmp_path / "run.py").write_text(KILLED)
    lives = tmp_path / "lives"
    lives.mkdir()
    (lives / "one").touch()
    run = tmp_path / "run"
    code, out = torchrun(2, tmp_path / "run.py", lives, *words(files, run))
    assert code != 0
    assert "rank      : 1" in out
    assert "Signal 9 (SIGKILL)" in out
    done = len(list(run.glob("shards/*.json")))
    assert 0 < done < 10
    assert funcattrib(*words(files, run)).code == 0
    assert funcattrib(*words(files, tmp_path / "whole")).code == 0
    assert content(run) == content(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["reduce", "score"])
def test_a_pass_with_one_result_goes_on_from_what_a_killed_rank_had(
    name: str, tmp_path: Path, files: Path, funcattrib, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run.py").write_text(KILLED)
    lives = tmp_path / "lives"
    lives.mkdir()
    (lives / "one").touch()
    _, _, *rest = words(files, tmp_path)
    if name == "score":
        assert funcattrib("reduce", tmp_path / "query", *rest).code == 0
        rest += ["--query-path", tmp_path / "query", "--score", "nearest", "--top-k", 7]
    code, out = torchrun(2, tmp_path / "run.py", lives, name, tmp_path / "run", *rest)
    assert code != 0
    assert "Signal 9 (SIGKILL)" in out
    parts = {part for _, own in progress_files.load_parts(tmp_path / "run") for part in own}
    (own,) = load_file(tmp_path / "run/progress-1.safetensors")["parts"].tolist()
    assert own in parts
    assert len(parts) < 10

    seen: list[int] = []
    rows_of = workload.rows_of
    monkeypatch.setattr(
        f"funcattrib.runs.{'best_rows' if name == 'score' else name}.rows_of",
        lambda work, compute, span, count: (seen.append(span[0] // 4), rows_of(work, compute, span, count))[1],
    )
    assert funcattrib(name, tmp_path / "run", *rest).code == 0
    assert sorted(seen) == sorted(set(range(10)) - parts), "the rest, and nothing else"
    assert funcattrib(name, tmp_path / "whole", *rest).code == 0
    assert not list((tmp_path / "run").glob(progress_files.FILES))
    if name == "score":
        assert content(tmp_path / "run") == content(tmp_path / "whole")
    else:
        ours, theirs = (open_store(tmp_path / each).matrix()[:] for each in ("run", "whole"))
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)


@pytest.mark.slow
def test_one_process_finds_the_batch_size_of_all(tmp_path: Path, files: Path, funcattrib) -> None:
    _, run, *rest = words(files, tmp_path / "run")
    auto = [*rest, "--token-batch-size", "auto"]
    code, out = torchrun(2, "-m", "funcattrib", "build", run, *auto, XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert code == 0, out
    found = open_store(run).manifest.computed_with["token_batch_size"]
    assert out.count("token batch size ") == out.count(f"token batch size {found:,} ") == 1
    log = (tmp_path / "run/logs/rank-1.log").read_text()
    assert "40 documents, " in log
    assert "token batch size" not in log
    assert funcattrib("build", tmp_path / "whole", *rest, "--token-batch-size", found).code == 0
    assert content(run) == content(tmp_path / "whole")


@pytest.mark.slow
def test_a_killed_rank_is_started_again_by_torchrun(tmp_path: Path, files: Path, funcattrib) -> None:
    (tmp_path / "run.py").write_text(KILLED)
    lives = tmp_path / "lives"
    lives.mkdir()
    (lives / "one").touch()
    code, out = torchrun(2, tmp_path / "run.py", lives, *words(files, tmp_path / "run"), restarts=2)
    assert code == 0, out
    assert not list(lives.iterdir()), "it was killed"
    assert funcattrib(*words(files, tmp_path / "whole")).code == 0
    assert content(tmp_path / "run") == content(tmp_path / "whole")


@pytest.mark.slow
def test_a_fit_that_was_killed_while_blocks_were_handed_on_goes_on(tmp_path: Path, files: Path) -> None:
    (tmp_path / "run.py").write_text(KILLED_FITTING)
    run, flags = tmp_path / "run", ["--precondition", "parameter", "--dtype", "float32"]
    for _ in range(2):  # what the first leaves the second removes
        code, out = torchrun(2, tmp_path / "run.py", *words(files, run), *flags)
        assert code != 0, out
        assert [str(file.relative_to(run)) for file in run.glob("fitting/*/*")] == ["fitting/0/00000.safetensors"]
        assert not (run / "state.safetensors").exists()
    code, out = torchrun(2, "-m", "funcattrib", *words(files, run), *flags)
    assert code == 0, out
    code, out = torchrun(2, "-m", "funcattrib", *words(files, tmp_path / "whole"), *flags)
    assert code == 0, out
    assert not (run / "fitting").exists()
    assert content(run) == content(tmp_path / "whole")


@pytest.mark.slow
def test_a_rank_of_a_sharded_fit_that_is_told_to_end_ends_all(tmp_path: Path, files: Path) -> None:
    (tmp_path / "run.py").write_text(TERMINATED)
    flags = ["--normalizer", "adafactor", "--shard-params"]
    code, out = torchrun(2, tmp_path / "run.py", *words(files, tmp_path / "run"), *flags)
    assert code != 0, out
    assert "exitcode  : 143" in out, "torchrun names the first that ended"
    assert out.count("Traceback (most recent call last)") <= 1, "torchrun's own alone"


@pytest.mark.slow
def test_the_ranks_speak_with_one_voice(tmp_path: Path, files: Path) -> None:
    """One progress line, one result; the others' reports in a log; one message for an error of all."""
    code, out = torchrun(2, "-m", "funcattrib", *words(files, tmp_path / "run"))
    assert code == 0, out
    assert out.count("documents, ") == out.count("40 rows ×") == 1
    assert out.count("40 rows in") == 1, "the line counts what all have done"
    assert "40 documents, " in (tmp_path / "run/logs/rank-1.log").read_text()
    code, out = torchrun(2, "-m", "funcattrib", *words(files, tmp_path / "run"), "--label-smoothing", "2")
    assert code != 0
    assert out.count("expected --label-smoothing in [0, 1), found 2.0") == 1
    code, out = torchrun(2, "-m", "funcattrib", *words(files, tmp_path / "run"), "--seed", "1")
    assert code != 0
    assert out.count("holds another run: seed: expected 1, found 0") == 1


@pytest.mark.slow
def test_nothing_is_left_where_nothing_was_begun(tmp_path: Path, files: Path) -> None:
    """Errors that come when documents were read, and when a folder was made to see whether all processes share it."""
    heads = ["--split-attention-modules", "*none*", "--num-heads", 2, "--head-size", 4]
    code, out = torchrun(2, "-m", "funcattrib", *words(files, tmp_path / "a/run"), *heads)
    assert code != 0
    assert out.count("40 documents, ") == 1
    assert out.count("funcattrib build: ") == 1
    _, _, *rest = words(files, tmp_path)
    code, out = torchrun(
        2, "-m", "funcattrib", "score", tmp_path / "b/run", *rest, "--query-dataset", tmp_path / "none.jsonl"
    )
    assert code != 0
    assert out.count("none.jsonl") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_parts_of_machines_that_share_no_folder_are_merged(tmp_path: Path, one_thread: None, funcattrib) -> None:
    (tmp_path / "run.py").write_text(APART)
    code, out = torchrun(2, tmp_path / "run.py", tmp_path)
    assert code == 0, out
    parts = [tmp_path / f"machine{rank}/run" for rank in range(2)]
    held = [{file.stem for file in part.glob("shards/*.json")} for part in parts]
    assert all(held)
    assert not held[0] & held[1]
    assert len(held[0] | held[1]) == 6
    assert all("is not shared between the machines" in (part.parent / "error").read_text() for part in parts)

    ran = funcattrib("merge", tmp_path / "merged", *parts)
    assert ran.code == 0, ran.err
    fa.collect_gradients(cases.causal("gpt_neox"), records(23, 1), path=tmp_path / "whole", **FITTED)
    merged, whole = open_store(tmp_path / "merged", verify=True), open_store(tmp_path / "whole")
    assert merged.manifest.complete
    np.testing.assert_allclose(np.asarray(merged.matrix()), np.asarray(whole.matrix()), rtol=1e-4, atol=1e-5)
    assert merged.examples[:] == whole.examples[:]
    assert merged.state().keys() == whole.state().keys()

    only = funcattrib("merge", tmp_path / "one", parts[0])
    assert only.code == 2
    assert f"{len(held[1])} of 6 shards are in none of the parts" in only.err
    # A part may be the target: what it lacks is added.
    assert len(merge_stores(parts[0], parts)) == 23
    assert content(parts[0]) == content(tmp_path / "merged")


@pytest.fixture
def two_parts(tmp_path: Path) -> list[Path]:
    """A store taken apart: the even shards and the odd ones."""
    settings = {**SETTINGS, "normalizer": "adafactor"}
    fa.collect_gradients(cases.causal("gpt_neox"), records(23, 1), path=tmp_path / "whole", **settings)
    return store_run.take_apart(tmp_path / "whole", [tmp_path / "part0", tmp_path / "part1"])


@pytest.mark.slow
def test_only_parts_that_fit_are_merged(two_parts: list[Path], tmp_path: Path) -> None:
    assert content(merge_stores(tmp_path / "merged", two_parts).path) == content(tmp_path / "whole")

    other = shutil.copytree(two_parts[1], tmp_path / "other")
    store_run.edit_manifest(other, seed=7)
    with pytest.raises(fa.StoreError, match=r"other is a part of another run than .*: seed: expected 0, found 7"):
        merge_stores(tmp_path / "no", [two_parts[0], other])

    state = open_store(tmp_path / "whole").state()
    save_file({name: tensor * 2 for name, tensor in state.items()}, other / "state.safetensors")
    store_run.edit_manifest(other, seed=0)
    with pytest.raises(fa.StoreError, match="other has another fitted state than"):
        merge_stores(tmp_path / "no", [two_parts[0], other])

    damaged = two_parts[1] / "shards/00001.npy"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    with pytest.raises(fa.StoreError, match="has changed since it was written"):
        merge_stores(tmp_path / "damaged", two_parts)
    with pytest.raises(fa.StoreError, match="no parts were given"):
        merge_stores(tmp_path / "none", [])


@pytest.mark.slow
def test_sigterm_finishes_the_shard_in_hand(tmp_path: Path, files: Path, funcattrib) -> None:
    slow = tmp_path / "slow.py"
    slow.write_text(
        "import sys, time\nfrom pathlib import Path\nimport funcattrib.runs.workload as workload\n"
        "from funcattrib.cli.main import main\nrows_of = workload.rows_of\n"
        "def slowly(*args):\n    Path(sys.argv[1]).touch()\n    while not Path(sys.argv[2]).exists():\n"
        "        time.sleep(0.01)\n    return rows_of(*args)\nworkload.rows_of = slowly\nsys.exit(main(sys.argv[3:]))\n"
    )
    run = start(slow, tmp_path / "begun", tmp_path / "signalled", *words(files, tmp_path / "run"))
    until(lambda: (tmp_path / "begun").exists() or run.poll() is not None)
    run.send_signal(signal.SIGTERM)
    (tmp_path / "signalled").touch()
    code, out = run.wait()
    assert code == 143, out
    assert "ended by SIGTERM. What is finished is kept" in out
    assert [file.stem for file in (tmp_path / "run/shards").glob("*.json")] == ["00000"]
    assert funcattrib(*words(files, tmp_path / "run")).code == 0
    assert funcattrib(*words(files, tmp_path / "whole")).code == 0
    assert content(tmp_path / "run") == content(tmp_path / "whole")

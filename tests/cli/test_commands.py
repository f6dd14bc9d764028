"""The commands as a user gives them: every input, every mistake, runs that are killed or starved and continued."""

import io
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pytest
import torch
import yaml

import funcattrib as fa
from tests.support import tiny
from tests.support.store_run import contents
from tests.support.waiting import until

TEXTS = tiny.texts(12)
ROOT = Path(__file__).parents[2]
SMALL = ("--projection-dim", 4, "--rows-per-shard", 5)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same documents in every form."""
    folder = tmp_path_factory.mktemp("data")
    table = datasets.Dataset.from_dict({"text": TEXTS})
    table.to_csv(folder / "d.csv")
    table.to_parquet(folder / "d.parquet")
    table.save_to_disk(folder / "saved")
    tiny.write_jsonl(folder / "d.jsonl", [{"text": text} for text in TEXTS])
    (folder / "d.txt").write_text("\n".join(TEXTS))
    for part in (0, 1):
        tiny.write_jsonl(folder / f"part{part}.jsonl", [{"text": text} for text in TEXTS[part * 6 : part * 6 + 6]])
    return folder


@pytest.fixture(scope="session")
def store(model_folder: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished store."""
    from funcattrib.cli.main import main

    run = tmp_path_factory.mktemp("runs") / "run"
    words = ("build", run, "--model", model_folder, "--dataset", data / "d.jsonl", *SMALL)
    assert main([str(word) for word in words]) == 0
    return run


def mistake(ran, message: str, command: str = "build") -> None:
    """Exit code 2, and two lines at most: what is wrong and what to do."""
    assert ran.code == 2, ran
    assert ran.out == ""
    said = ran.err[ran.err.index(f"funcattrib {command}: ") :]
    assert message in said
    assert len(said.splitlines()) <= 2, said
    assert "Traceback" not in ran.err
    assert "Warning" not in ran.err


@pytest.mark.parametrize("form", ["d.csv", "d.jsonl", "d.txt", "d.parquet", "saved", "part*.jsonl"])
def test_build_from_every_form(funcattrib, tmp_path: Path, model_folder: Path, data: Path, form: str, store) -> None:
    ran = funcattrib("build", tmp_path / "run", "--model", model_folder, "--dataset", data / form, *SMALL)
    assert ran.code == 0
    assert ran.out.startswith(f"{tmp_path / 'run'}: 12 rows × 128 (8 leaves, float16")
    assert ran.out.count("\n") == 1
    assert "12 documents" in ran.err
    assert "Warning" not in ran.err
    built = fa.open_store(tmp_path / "run", verify=True)
    assert built.examples["text"][:] == TEXTS
    assert (built.matrix()[:] == fa.open_store(store).matrix()[:]).all()


def test_hyphens_and_underscores(funcattrib, tmp_path: Path, model_folder: Path, data: Path, store: Path) -> None:
    words = ("--model", model_folder, "--dataset", data / "d.jsonl", "--projection_dim=4", "--rows_per-shard", 5)
    ran = funcattrib("build", tmp_path / "run", *words, "--token_batch_size", 4096)
    assert ran.code == 0
    assert (fa.open_store(tmp_path / "run").matrix()[:] == fa.open_store(store).matrix()[:]).all()


def test_a_config_replays_the_run(funcattrib, tmp_path: Path, store: Path) -> None:
    saved = yaml.safe_load((store / "config.yaml").read_text())
    assert saved["command"] == "build"
    assert saved["overwrite"] is False
    assert funcattrib("build", "--config", store / "config.yaml").code == 0  # the finished run itself
    assert funcattrib("build", tmp_path / "again", "--config", store / "config.yaml").code == 0
    ours, theirs = contents(tmp_path / "again"), contents(store)
    assert yaml.safe_load(ours.pop("config.yaml")) == saved | {"run": str(tmp_path / "again")}
    theirs.pop("config.yaml")
    assert ours == theirs
    other = funcattrib("build", tmp_path / "other", "--config", store / "config.yaml", "--dtype", "float32")
    assert other.code == 0
    assert fa.open_store(tmp_path / "other").manifest.dtype == "float32"


def test_another_command_on_the_same_run(funcattrib, tmp_path: Path, model_folder: Path, data: Path) -> None:
    words = ("build", tmp_path / "run", "--model", model_folder, "--dataset", data / "d.jsonl", "--rows-per-shard", 5)
    assert funcattrib(*words).code == 0
    before = contents(tmp_path / "run")
    ran = funcattrib(*words, "--projection-dim", 8)
    mistake(
        ran, "chain: expected project(k=8, kind=rademacher, seed=0), found project(k=16, kind=rademacher, seed=0)\n"
    )
    assert "leaves" not in ran.err
    mistake(funcattrib(*words, "--exclude", "*mlp*"), 'holds another run: loss.exclude: expected ["*mlp*"], found []\n')
    mistake(funcattrib(*words, "--normalizer", "adafactor"), "chain: expected adafactor_norm(eps=1e-30) → project(")
    tiny.write_jsonl(tmp_path / "d.jsonl", [{"text": text} for text in TEXTS[::-1]])
    ran = funcattrib(*words[:4], "--dataset", tmp_path / "d.jsonl", "--rows-per-shard", 5)
    mistake(ran, "data.fingerprint: expected ")
    assert "use --overwrite to replace it, or another RUN" in ran.err
    assert contents(tmp_path / "run") == before
    assert funcattrib(*words, "--projection-dim", 8, "--overwrite").code == 0
    assert fa.open_store(tmp_path / "run", verify=True).width == 8 * 64
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["overwrite"] is False


def test_documents_that_are_too_long(funcattrib, tmp_path: Path, model_folder: Path) -> None:
    rows = [{"text": text} for text in [*TEXTS, *tiny.texts(1, longest=3), " ".join(["w1"] * 65)]]
    words = (
        "build",
        tmp_path / "run",
        "--model",
        model_folder,
        "--dataset",
        tiny.write_jsonl(tmp_path / "d.jsonl", rows),
    )
    ran = funcattrib(*words)
    mistake(ran, "row 13")
    assert "65" in ran.err
    assert "--truncation" in ran.err or "truncation" in ran.err
    ran = funcattrib(*words, "--truncation")
    assert ran.code == 0
    assert "1 document was cut to the longest length allowed" in ran.err
    assert fa.open_store(tmp_path / "run").examples["tokens"][:][-1] == 64
    assert funcattrib(*words, "--truncation", "--max-length", 10, "--overwrite").code == 0
    assert max(fa.open_store(tmp_path / "run").examples["tokens"][:]) == 10


def test_documents_without_a_gradient(funcattrib, tmp_path: Path, model_folder: Path) -> None:
    file = tiny.write_jsonl(tmp_path / "d.jsonl", [{"text": text} for text in ("", "w1", "w1 w2 w3")])
    ran = funcattrib("build", tmp_path / "run", "--model", model_folder, "--dataset", file)
    assert ran.code == 0
    assert "2 documents have fewer than 2 tokens: kept, with a zero gradient" in ran.err
    assert fa.open_store(tmp_path / "run").matrix()[:].any(1).tolist() == [False, False, True]


@pytest.mark.parametrize(
    ("content", "flags", "message"),
    [
        (None, (), "' does not exist; give a hub id"),
        ("", (), "d.jsonl is empty"),
        (
            '{"text": "w1 w2"}\n',
            ("--prompt-column", "body"),
            "name the right one with --prompt-column, --completion-column",
        ),
        ('{"text": "w1 w2"}\n', ("--completion-column", "answer"), "answer"),
        (
            '{"text": "w1 w2"}\n',
            ("--completion-column", "text", "--conversation-column", "text"),
            "--conversation-column ('text') and --completion-column ('text') cannot be combined",
        ),
        ('{"text": "w1 w2"}\n', ("--conversation-column", "turns"), "turns"),
        ('{"text": "w1 w2"}\n', ("--conversation-column", "text"), "text"),
        ('{"text": "w1 w2"}\n', ("--split", "dev"), "has no split 'dev'"),
        ('{"text": "w1 w2"}\n{"text": null}\n', (), "column 'text' has null in place of text in 1 row: 1"),
        ('{"text": 3}\n', (), "expected text in column 'text'"),
        ('{"text": NaN}\n', (), "expected"),
        ('{"text": "w1', (), "cannot be read"),
        ('{"input_ids": [1, 99]}\n', (), "found 99 in row 0"),
        ('{"input_ids": [1, 2], "labels": [1]}\n', (), "row 0"),
        ('{"text": "w1 w2"}\n', ("--token-batch-size", "0"), "expected --token-batch-size of at least 1, found 0"),
        ('{"text": "w1 w2"}\n', ("--projection-dim", "-1"), "expected --projection-dim of at least 0, found -1"),
        ('{"text": "w1 w2"}\n', ("--max-length", "0"), "expected --max-length of at least 1, found 0"),
        ('{"text": "w1 w2"}\n', ("--max-length", "65"), "within the model's context of 64 tokens, found 65"),
        ('{"text": "w1 w2"}\n', ("--modules", "*.nothing"), "no parameter's name matches '*.nothing'"),
        ('{"text": "w1 w2"}\n', ("--exclude", "*"), "there are no weight matrices in the model's blocks"),
        ('{"text": "w1 w2"}\n', ("--label-smoothing", "1"), "expected --label-smoothing in [0, 1), found 1"),
        (
            '{"text": "w1 w2"}\n',
            ("--label-smoothing", "0.1", "--loss", "log_odds"),
            "label_smoothing=0.1 requires kind='ce'",
        ),
        ('{"text": "w1 w2"}\n', ("--device", "cuda:99"), "device 'cuda:99' is not available on this machine"),
        ('{"text": "w1 w2"}\n', ("--device", "abacus"), "expected a device such as cpu or cuda, found 'abacus'"),
        ('{"text": "w1 w2"}\n', ("--tokenizer", "./nowhere"), "nowhere"),
        ('{"text": "w1 w2"}\n', ("--config", "nowhere.yaml"), "nowhere.yaml: this file cannot be read"),
    ],
)
def test_mistakes_of_the_data_and_the_flags(
    funcattrib, tmp_path: Path, model_folder: Path, content: str | None, flags: tuple[str, ...], message: str
) -> None:
    if content is not None:
        (tmp_path / "d.jsonl").write_text(content)
    ran = funcattrib("build", tmp_path / "run", "--model", model_folder, "--dataset", tmp_path / "d.jsonl", *flags)
    mistake(ran, message)
    assert not (tmp_path / "run").exists()


def test_a_hub_that_does_not_answer(funcattrib, tmp_path: Path, model_folder: Path, monkeypatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    asked: list[object] = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *words, **_: asked.append(words))
    words = "build runs/quickstart --model EleutherAI/pythia-14m --dataset NeelNanda/pile-10k --truncation"
    ran = funcattrib(*words.split(), "--token_batch_size", "4096")
    mistake(ran, "the model 'EleutherAI/pythia-14m' cannot be loaded")
    assert "the hub does not answer, and there is no copy in the cache" in ran.err
    mistake(
        funcattrib("build", "run", "--model", model_folder, "--dataset", "NeelNanda/pile-10k"), "NeelNanda/pile-10k"
    )
    assert asked == [], "nobody is waited for"
    assert not list(tmp_path.iterdir())


def test_flags_that_do_not_parse(funcattrib, tmp_path: Path) -> None:
    for words in (
        ("build",),
        ("build", tmp_path / "run", "--model", "m"),
        ("query", "--index", "r", "--top-k", "many"),
    ):
        ran = funcattrib(*words)
        assert ran.code == 2
        assert "Traceback" not in ran.err


def test_a_folder_that_is_no_store(funcattrib, tmp_path: Path, model_folder: Path, data: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/thesis.tex").write_text("mine")
    for extra in ((), ("--overwrite",)):
        words = ("--model", model_folder, "--dataset", data / "d.jsonl", *extra)
        mistake(funcattrib("build", tmp_path / "run", *words), "thesis.tex")
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["thesis.tex"]
    for command in (("inspect", tmp_path / "run"), ("query", "--index", tmp_path / "run", "--text", "w1 w2")):
        mistake(funcattrib(*command), "is not a store: it has no manifest.json", command[0])


# A process that has imported everything (which takes seconds) and forks one that runs the command at every line read.
# The line says after how many shards it stops and waits to be killed, however late.
FORKING = """
import itertools, os, signal, sys
import funcattrib.runs.collect, funcattrib.cli.load
from funcattrib.cli.main import main
from funcattrib.store import StoreWriter
put, handed = StoreWriter.put, itertools.count()
for line in sys.stdin:
    child = os.fork()
    if not child:
        StoreWriter.put = lambda *words: put(*words) if next(handed) < int(line) else signal.pause()
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os._exit(main(sys.argv[1:]))
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def start(run: Path, model: Path, *flags: object, program: tuple[str, ...] = ("-m", "funcattrib"), **options: object):
    words = ["build", run.name, "--model", model, "--dataset", "../d.jsonl", *flags]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *program, *map(str, words)]
    run.parent.mkdir(exist_ok=True)
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen(command, cwd=run.parent, env=env, text=True, **pipes, **options)


def whole(run: Path, model: Path, *flags: object) -> dict[str, bytes]:
    """The store that the same command writes in this process."""
    from funcattrib.cli.main import main

    run.parent.mkdir(exist_ok=True)
    folder, threads = Path.cwd(), torch.get_num_threads()
    try:
        os.chdir(run.parent)
        torch.set_num_threads(1)
        words = ["build", run.name, "--model", model, "--dataset", "../d.jsonl", *flags]
        assert main([str(word) for word in words]) == 0
    finally:
        torch.set_num_threads(threads)
        os.chdir(folder)
    return contents(run)


@pytest.mark.slow
def test_killed_at_five_random_moments(tmp_path: Path, model_folder: Path) -> None:
    count, moments = 160, random.Random(1)
    tiny.write_jsonl(tmp_path / "d.jsonl", [{"text": text} for text in tiny.texts(count, longest=40)])
    flags = ("--normalizer", "adafactor", "--rows-per-shard", 2, "--token-batch-size", 128, "--dtype", "int8")
    shards = tmp_path / "killed/run/shards"
    finished = [0]
    forking = start(tmp_path / "killed/run", model_folder, *flags, program=("-c", FORKING))
    for _ in range(5):
        target = finished[-1] + moments.randint(0, 8)
        forking.stdin.write(f"{target - finished[-1] + 6}\n")
        forking.stdin.flush()
        child = int(forking.stdout.readline())
        until(lambda least=target: len(list(shards.glob("*.json"))) > least or forking.poll() is not None, 0.002)
        time.sleep(moments.uniform(0, 0.05))
        os.kill(child, signal.SIGKILL)
        assert int(forking.stdout.readline()) == -signal.SIGKILL
        finished.append(len(list(shards.glob("*.json"))))
    forking.communicate()
    assert finished == sorted(finished)
    assert finished[1] > 0
    assert finished[-1] < count // 2
    process = start(tmp_path / "killed/run", model_folder, *flags)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert out.splitlines() == ["run: 160 rows × 2,048 (8 leaves, int8, 0.3 MiB), adafactor_norm → project"]
    documents, progress = err.splitlines()
    assert documents.startswith("160 documents, ")
    assert progress.startswith("build: ")
    assert whole(tmp_path / "whole/run", model_folder, *flags) == contents(tmp_path / "killed/run")


@pytest.mark.slow
def test_a_disk_that_is_full(tmp_path: Path, model_folder: Path) -> None:
    tiny.write_jsonl(tmp_path / "d.jsonl", [{"text": text} for text in tiny.texts(60)])
    flags = ("--dtype", "float32", "--rows-per-shard", 30)

    def starved() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, resource.RLIM_INFINITY))

    process = start(tmp_path / "full/run", model_folder, *flags, preexec_fn=starved)
    out, err = process.communicate()
    assert process.returncode == 2, err
    said = err[err.index("funcattrib build: ") :].splitlines()
    assert len(said) == 2
    assert "shards/00000.npy cannot be written: it exceeds the file-size limit" in said[0]
    assert "run the same command again" in said[1]
    assert out == ""
    assert not list(tmp_path.rglob("*.tmp"))
    again = whole(tmp_path / "full/run", model_folder, *flags)
    assert again == whole(tmp_path / "whole/run", model_folder, *flags)


def test_ctrl_c_says_that_the_run_goes_on(funcattrib, tmp_path, model_folder, data, monkeypatch) -> None:
    from funcattrib.store import StoreWriter

    words = ("build", tmp_path / "run", "--model", model_folder, "--dataset", data / "d.jsonl", *SMALL)
    put = StoreWriter.put

    def stop(writer: StoreWriter, shard: int, *rest: object) -> None:
        if shard == 1:
            raise KeyboardInterrupt
        put(writer, shard, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(StoreWriter, "put", stop)
        ran = funcattrib(*words)
    assert ran.code == 130
    assert "What is finished is kept: the same command continues it." in ran.err
    ran = funcattrib("inspect", tmp_path / "run")
    assert ran.code == 0
    assert "shards: 1 of 3 (unfinished)" in ran.out
    (said,) = ran.err.splitlines()
    assert said.startswith(f"{tmp_path / 'run'} is unfinished: 5 of 12 rows are there (1 of 3 shards); run the same")
    assert "Warning" not in funcattrib("query", "--index", tmp_path / "run", "--text", "w1 w2 w3").err
    assert funcattrib(*words).code == 0
    assert "(unfinished)" not in funcattrib("inspect", tmp_path / "run").out


def test_inspect(funcattrib, tmp_path: Path, store: Path, model_folder: Path) -> None:
    ran = funcattrib("inspect", store, "--verify", "--leaves")
    assert ran.code == 0
    assert ran.err == ""
    for line in (
        f"model: {model_folder.resolve()} (GPTNeoXForCausalLM",
        "stage: project(k=4, kind=rademacher, seed=0)",
        "gpt_neox.layers.0.attention.query_key_value.weight",
        "every file is as it was written",
        "(a proponent)",
    ):
        assert line in ran.out
    shutil.copytree(store, tmp_path / "run")
    altered = bytearray((tmp_path / "run/shards/00001.npy").read_bytes())
    altered[-1] ^= 1
    (tmp_path / "run/shards/00001.npy").write_bytes(altered)
    ran = funcattrib("inspect", tmp_path / "run", "--verify")
    assert ran.code == 1
    assert "shards/00001.npy" in ran.out
    (tmp_path / "run/shards/00001.npy").write_bytes(altered[:-7])
    mistake(funcattrib("inspect", tmp_path / "run"), "shards/00001.npy", "inspect")


def test_query_answers_a_text(funcattrib, tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # the store knows where its model is, from any folder
    ran = funcattrib("query", "--index", store, "--text", TEXTS[7], "--top-k", 3, "--unit-norm")
    assert ran.code == 0
    assert "finds more of the sentences that the model has memorised" in ran.err
    header, *lines = ran.out.splitlines()
    assert header.split() == ["rank", "score", "example", "text"]
    rank, score, example, *_ = lines[0].split()
    assert (rank, example) == ("1", "7")
    assert float(score) == pytest.approx(1, abs=1e-3)
    assert funcattrib("query", "--index", store, "--text", "w1 w2", "--completion", " w3", "--reverse").code == 0
    ran = funcattrib("query", "--index", store, "--text", TEXTS[7], "--top-k", 1, "--unit-norm", "--faiss", "Flat")
    assert ran.out.splitlines()[1].split()[2] == "7"


def test_query_prompt_loop_and_record(funcattrib, tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import csv
    import io

    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{TEXTS[2]}\n\nw1\n{TEXTS[5]}\nquit\n{TEXTS[6]}\n"))
    file = tmp_path / "out.csv"
    ran = funcattrib("query", "--index", store, "--top-k", 2, "--unit-norm", "--record", file)
    assert ran.code == 0
    assert ran.out.count("rank") == 2
    assert "funcattrib query: the query's gradient is zero" in ran.err
    rows = list(csv.DictReader(file.open(newline="")))
    assert [(row["query"], row["rank"], row["id"]) for row in rows if row["rank"] == "1"] == [
        (TEXTS[2], "1", "2"),
        (TEXTS[5], "1", "5"),
    ]
    assert len(rows) == 4
    assert rows[0]["text"] == TEXTS[2]
    (tmp_path / "other.csv").write_text("a,b\n")
    for target in (tmp_path / "other.csv", tmp_path / "no/out.csv"):
        ran = funcattrib("query", "--index", store, "--text", "w1 w2", "--record", target)
        assert ran.code == 2
        assert "record to another file" in ran.err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--text", "w1"), "the query's gradient is zero: its text has fewer than two tokens that count"),
        (("--text", "w1 w2", "--faiss", "Nonsense"), "Nonsense"),
        (("--text", "w1 w2", "--top-k", "0"), "expected --top-k of at least 1, found 0"),
        (("--completion", "w1 w2"), "--completion requires --text"),
        (("--text", "w1 w2", "--precision", "bf16"), "dtype float32"),
        (("--text", "w1 w2", "--model", "./nowhere"), "nowhere"),
    ],
)
def test_mistakes_of_a_query(funcattrib, store: Path, flags: tuple[str, ...], message: str) -> None:
    ran = funcattrib("query", "--index", store, *flags)
    assert ran.code == 2
    assert message in ran.err
    assert len(ran.err[ran.err.index("funcattrib query: ") :].splitlines()) <= 2


def test_query_with_another_model_is_refused(funcattrib, tmp_path: Path, store: Path) -> None:
    other = tiny.save_model(tmp_path / "llama", "llama")
    ran = funcattrib("query", "--index", store, "--text", "w1 w2", "--model", other)
    mistake(ran, "architecture GPTNeoXForCausalLM", "query")
    assert "LlamaForCausalLM" in ran.err


def test_a_store_of_a_narrow_model_is_queried_in_its_precision(
    funcattrib, tmp_path: Path, model_folder: Path, data: Path
) -> None:
    words = ("--model", model_folder, "--dataset", data / "d.jsonl", "--precision", "bf16", "--projection-dim", 4)
    assert funcattrib("build", tmp_path / "run", *words).code == 0
    ran = funcattrib("query", "--index", tmp_path / "run", "--text", TEXTS[3], "--unit-norm", "--top-k", 1)
    assert ran.code == 0
    assert ran.out.splitlines()[1].split()[2] == "3"


def test_check(funcattrib, model_folder: Path) -> None:
    ran = funcattrib("check", "--model", model_folder)
    assert ran.code == 0
    assert ran.out.splitlines()[-1] == "Rows are the model's own gradients, and do not depend on their batch."
    assert ran.err == ""
    mistake(funcattrib("check", "--model", model_folder, "--lengths", "5", "65"), "found 5, 65\n", "check")


def test_text_that_is_no_unicode_is_refused_line_by_line(funcattrib, store: Path, monkeypatch) -> None:
    mistake(funcattrib("query", "--index", store, "--text", "caf\udce9"), "half a character, '\\udce9'", "query")
    typed = io.TextIOWrapper(io.BytesIO(b"caf\xe9\n" + TEXTS[2].encode() + b"\n"), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", typed)
    ran = funcattrib("query", "--index", store, "--top-k", 1)
    assert ran.code == 0
    assert "half a character" in ran.err
    assert TEXTS[2] in ran.out


@pytest.mark.parametrize(
    ("command", "words", "says"),
    [
        ("less", ("--checkpoint", "m", "--dataset", "d", "--query-dataset", "q", "--show", 0), "--show"),
        ("trak", ("--checkpoint", "m", "--dataset", "d", "--query-dataset", "q", "--show", 0), "--show"),
        ("trackstar", ("--model", "m", "--dataset", "d", "--query-dataset", "q", "--show", 0), "--show"),
        ("score", ("--model", "m", "--dataset", "d", "--score", "self", "--top-k", 0), "top"),
        ("build", ("--model", "m", "--dataset", "d", "--seed", -1), "seed"),
    ],
)
def test_flags_out_of_range_are_refused_first(funcattrib, tmp_path: Path, command: str, words, says: str) -> None:
    ran = funcattrib(command, tmp_path / "run", *words)
    assert ran.code == 2
    assert says in ran.err
    assert "of at least" in ran.err
    assert not (tmp_path / "run").exists()


def test_flags_that_nothing_would_read_are_refused(funcattrib, tmp_path: Path, model_folder: Path, store, data) -> None:
    for words in (("--nprobe", 4), ("--mmap-index",)):
        ran = funcattrib("query", "--index", store, "--text", "w1 w2", *words)
        assert ran.code == 2
        assert f"{words[0]} requires --faiss" in ran.err
    words = ("--model", model_folder, "--dataset", data / "d.jsonl", "--subset", "x")
    mistake(funcattrib("build", tmp_path / "run", *words), "--subset is of data sets on the hub")

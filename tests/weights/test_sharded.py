"""Models in shards: rows are those of the whole model, memory is a share and what is in use, unequal work goes on."""

import copy
import csv
import io
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import load_from_disk

import funcattrib as fa
from funcattrib.models.identity import model_identity
from funcattrib.models.loading import load_model
from funcattrib.models.sharded_loading import Shards
from funcattrib.query import stored_loss
from funcattrib.weights.sharded import Gathers, chunk_rows, row_range
from funcattrib.weights.stored import Stored
from tests.support import cases, sharded_run, tiny
from tests.support.processes import torchrun

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
SINGLE_PROCESS = Shards(Gathers(None), CPU)


def start(folder: Path, processes: int, script: str = "tests/support/sharded_run.py") -> list[dict]:
    code, out = torchrun(processes, script, folder)
    assert code == 0, out
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(processes)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    return {size: tmp_path_factory.mktemp(f"of{size}") for size in (2, 4)}


@pytest.fixture(scope="module")
def two(folders: dict[int, Path]) -> list[dict]:
    return start(folders[2], 2)


@pytest.fixture(scope="module")
def four(folders: dict[int, Path]) -> list[dict]:
    return start(folders[4], 4)


@pytest.mark.parametrize("how", ["fsdp", "loaded"])
@pytest.mark.parametrize("name", sharded_run.TWO)
def test_rows_of_two_processes(name: str, how: str, two: list[dict]) -> None:
    for rank in two:
        assert len(rank[f"{how} {name}"]) == 7
        assert max(rank[f"{how} {name}"].values()) <= 1e-6


@pytest.mark.parametrize("how", ["fsdp", "loaded"])
@pytest.mark.parametrize("name", sharded_run.FOUR)
def test_rows_of_two_copies_of_two_shards(name: str, how: str, four: list[dict]) -> None:
    for rank in four:
        assert max(rank[f"{how} {name}"].values()) <= 1e-6


def test_uneven_shards(two: list[dict], four: list[dict]) -> None:
    """61 rows of the embedding, 24 of most matrices; each copy lies on two ranks."""
    for ranks in (two, four):
        assert [rank["rows"]["gpt_neox.embed_in.weight"] for rank in ranks] == [31, 30] * (len(ranks) // 2)
        assert {rank["rows"]["gpt_neox.layers.0.mlp.dense_4h_to_h.weight"] for rank in ranks} == {12}


def test_the_callers_model_is_left_alone(two: list[dict], four: list[dict]) -> None:
    assert all(rank["left alone"] for rank in (*two, *four))


def test_half_precision_offloading_and_other_placements(two: list[dict]) -> None:
    for rank in two:
        assert max(rank["bf16"].values()) == 0
        assert max(rank["offloaded"].values()) <= 1e-6
        assert rank["refused"].startswith("expected 0.weight sharded along its rows")


def test_memory_is_the_weight_in_use_and_the_next_matrix(two: list[dict]) -> None:
    for rank in two:
        seen, sizes = rank["memory"], rank["memory"]["sizes"]
        vectors = sum(size for size in sizes.values() if size < 24 * 24 * 4)
        two_largest = sum(sorted(sizes.values())[-2:])
        assert 0 < max(seen["alive"]) <= two_largest + vectors < sum(sizes.values()) / 2
        assert len(seen["foreseen"]) == 68
        assert all(seen["foreseen"])


def test_unequal_work(two: list[dict]) -> None:
    first, second = (rank["unequal"] for rank in two)
    assert first["worst"] <= 1e-6
    assert second["worst"] <= 1e-6
    assert (first["small"], second["small"]) == (2, 2)  # for the order; one batch against three adds none
    assert (first["done"], second["done"]) == (3, 1)
    assert second["terminated"]
    assert (first["small after"], second["small after"]) == (0, 0)
    assert [rank["fitted"] for rank in two] == [1, -1]


def test_commands(two: list[dict], four: list[dict], folders: dict[int, Path], funcattrib, tmp_path: Path) -> None:
    assert all(set(rank["runs"].values()) == {0} for rank in (*two, *four))
    assert set(two[0]["runs"]) == set(sharded_run.COMMANDS) == {*four[0]["runs"], "experts"}
    for name in ("build", "reduce", "experts", "tied", "less", "trak"):
        assert funcattrib(*sharded_run.words(name, folders[2], tmp_path)).code == 0
        whole = fa.open_store(tmp_path / name)
        for folder in [folder for size, folder in folders.items() if size == 2 or name != "experts"]:
            sharded = fa.open_store(folder / name, verify=True)
            assert sharded.manifest.model["fingerprint"] == whole.manifest.model["fingerprint"]
            ours, theirs = sharded.matrix()[:], whole.matrix()[:]
            assert np.abs(ours - theirs).max() <= (1e-5 if name == "less" else 1e-6) * np.abs(theirs).max()
    selected = [load_from_disk(folder / "less/selected")["text"][:] for folder in (tmp_path, *folders.values())]
    assert len(selected[0]) == 4
    assert selected[0] == selected[1] == selected[2]


def test_queries(
    two: list[dict],
    four: list[dict],
    folders: dict[int, Path],
    funcattrib,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A prompt loop that the first process reads; a text without a gradient is told once, and the loop goes on."""
    assert funcattrib(*sharded_run.words("build", folders[2], tmp_path)).code == 0
    monkeypatch.setattr("sys.stdin", io.StringIO(sharded_run.ASKED))
    alone = funcattrib(*sharded_run.words("query", folders[2], tmp_path))
    assert alone.code == 0
    assert alone.err.count("the query's gradient is zero") == 1
    expected = list(csv.DictReader((tmp_path / "query.csv").open()))
    assert [hit["query"] for hit in expected] == ["w1 w2 w3"] * 5 + ["w5 w6 w7 w8"] * 5
    for size, folder in folders.items():
        found = list(csv.DictReader((folder / "query.csv").open()))
        assert [(hit["query"], hit["row"]) for hit in found] == [(hit["query"], hit["row"]) for hit in expected]
        ours, theirs = ([float(hit["score"]) for hit in hits] for hits in (found, expected))
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)
        told = [(folder / f"told{rank}").read_text() for rank in range(size)]
        assert told == [alone.err, *[""] * (size - 1)]


def test_moments_lie_in_the_same_shards(two: list[dict], four: list[dict]) -> None:
    for ranks in (two, four):
        assert [rank["moments"]["rows"] for rank in ranks] == [31, 30] * (len(ranks) // 2)
        assert all(rank["moments"]["off"] == 0 for rank in ranks)


def test_a_checkpoints_shards_are_let_go(two: list[dict], four: list[dict]) -> None:
    assert all(rank["let go"] == [True, True] for rank in (*two, *four))


def test_a_store_of_kl_is_asked_with_its_reference_in_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, other = tiny.save_model(tmp_path / "model"), tmp_path / "other"
    changed = copy.deepcopy(cases.causal("gpt_neox"))
    torch.nn.init.normal_(changed.get_output_embeddings().weight, generator=torch.Generator().manual_seed(3))
    changed.save_pretrained(other)
    data = [{"input_ids": [1, 2, 3, 4]}, {"input_ids": [5, 6, 7]}]
    whole = load_model(str(model), device="cpu")
    settings = {"loss": "kl", "projection_dim": 4, "quiet": True}
    fa.collect_gradients(whole.model, data, path=tmp_path / "run", reference_model=str(other), **settings)
    loaded = []
    monkeypatch.setattr(stored_loss, "load_model", lambda *a, **k: loaded.append(load_model(*a, **k)) or loaded[-1])
    asked = ["w1 w2 w3"]
    rows = [
        fa.Attributor(tmp_path / "run", model=each, tokenizer=whole.tokenizer).gradients(asked)
        for each in (load_model(str(model), device="cpu", shards=SINGLE_PROCESS).model, whole.model)
    ]
    assert torch.equal(*rows)
    assert [isinstance(next(each.model.parameters()), Stored) for each in loaded] == [True, False]


@pytest.mark.parametrize("name", [*cases.CAUSAL, cases.TIED])
def test_a_single_process_holds_all_rows(name: str, tmp_path: Path) -> None:
    """In files of a few weights each; a mixture's experts are put together."""
    cases.causal(name).save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    model, whole = (load_model(str(tmp_path), device="cpu", shards=shards).model for shards in (SINGLE_PROCESS, None))
    assert model_identity(model) == model_identity(whole)
    assert all(isinstance(p, Stored) for p in model.parameters() if p.ndim)
    assert not any(p.requires_grad for p in model.parameters())
    buffers = dict(model.named_buffers())
    assert all(torch.equal(buffer, buffers[key]) for key, buffer in whole.named_buffers())
    ids = cases.batch()["input_ids"]
    assert torch.equal(model(input_ids=ids).logits, whole(input_ids=ids).logits)


def test_checkpoints_that_do_not_fit(tmp_path: Path) -> None:
    def refused(name: str, message: str) -> None:
        with pytest.raises(fa.FuncattribError, match=message) as caught:
            load_model(str(tmp_path / name), device="cpu", shards=SINGLE_PROCESS)
        assert str(caught.value).count("\n") <= 1

    cases.causal("gpt_neox").gpt_neox.save_pretrained(tmp_path / "body")
    refused("body", "body lacks 1 weights of GPTNeoXForCausalLM, among them lm_head.weight")
    folder = tiny.save_model(tmp_path / "wide", "llama")
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"intermediate_size": 40', '"intermediate_size": 44'))
    refused("wide", r"of shape \(44, 24\) in the checkpoint, found \(40, 24\)")
    (tiny.save_model(tmp_path / "empty") / "model.safetensors").unlink()
    refused("empty", "the model .* cannot be loaded")


def test_flags(funcattrib, model_folder: Path, tmp_path: Path) -> None:
    run = partial(funcattrib, "build", tmp_path / "run", "--model", model_folder, "--dataset", "none.jsonl")
    assert "--offload-params requires --shard-params" in run("--offload-params").err
    assert "--shard-ranks requires --shard-params" in run("--shard-ranks", 2).err
    assert "to divide the 1 processes of this run, found 2" in run("--shard-params", "--shard-ranks", 2).err
    data = ["--dataset", "none.jsonl", "--query-dataset", "none.jsonl", "--checkpoint", model_folder]
    for words in (["less", tmp_path / "run", *data], ["trak", tmp_path / "run", *data], ["query", "--index", tmp_path]):
        ran = funcattrib(*words, "--shard-ranks", 2)
        assert (ran.code, "--shard-ranks requires --shard-params" in ran.err) == (2, True)


def test_parts_as_fsdp_makes_them() -> None:
    for rows in (1, 3, 7, 8):
        for ranks in (1, 2, 4, 5):
            whole = torch.arange(rows)
            parts = [whole[slice(*row_range(rows, ranks, rank))] for rank in range(ranks)]
            chunks = [*whole.chunk(ranks), *[whole[:0]] * ranks][:ranks]
            assert all(torch.equal(part, chunk) for part, chunk in zip(parts, chunks, strict=True))
            assert max(map(len, parts)) == chunk_rows(rows, ranks)

"""The writer: what it takes, what it refuses, how it overlaps, what it writes."""

import json
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from funcattrib.errors import StoreError
from funcattrib.store import create_store, differences, identity, open_store, write_shard, writer
from funcattrib.store.manifest import Manifest
from tests.support.store_run import contents, examples, manifest, rows, write
from tests.support.waiting import OUTER_LIMIT, until


def test_the_files_are_what_the_format_says(tmp_path: Path) -> None:
    run = write(tmp_path / "run", dtype="int8")
    names = [f"shards/{i:05d}{end}" for i in range(5) for end in (".npy", ".scale.npy")]
    names += [f"examples/{i:05d}.arrow" for i in range(5)]
    assert sorted(contents(run)) == sorted([*names, "config.yaml", "manifest.json", "state.safetensors"])
    values = json.loads((run / "manifest.json").read_text())
    assert (values["format"], values["format_version"], values["complete"]) == ("funcattrib gradient store", 1, True)
    assert values["leaves"][1] == {"name": "0.bias", "shape": [8], "start": 32, "stop": 40}
    assert values["shards"][4]["file"] == "shards/00004.npy"
    assert (values["shards"][4]["start"], values["shards"][4]["stop"]) == (64, 70)
    shard = np.load(run / "shards/00004.npy", allow_pickle=False)
    scale = np.load(run / "shards/00004.scale.npy", allow_pickle=False)
    assert (shard.shape, shard.dtype, scale.shape, scale.dtype) == ((6, 64), np.int8, (6,), np.float32)
    with pa.memory_map(str(run / "examples/00004.arrow")) as file:
        assert pa.ipc.open_stream(file).read_all().column("id").to_pylist() == [*range(64, 70)]


def test_a_bfloat16_shard_holds_the_upper_halves_of_float32(tmp_path: Path) -> None:
    write(tmp_path / "run", dtype="bfloat16")
    bits = np.load(tmp_path / "run/shards/00000.npy", allow_pickle=False)
    assert bits.dtype == np.uint16
    found = (bits.astype(np.uint32) << 16).view(np.float32)
    assert (found == rows(range(16)).bfloat16().float().numpy()).all()


def test_a_wide_row_is_encoded_as_any_other(tmp_path: Path) -> None:
    from funcattrib.store import lay_out

    wide = torch.randn(3, 100_001, generator=torch.Generator().manual_seed(0))
    with create_store(tmp_path, manifest(rows=3, leaves=lay_out({"w": (100_001,)}), dtype="float16")) as writer:
        writer.put(0, wide, {})
        writer.finish()
    assert (open_store(tmp_path, verify=True).matrix()[:] == wide.half().numpy()).all()
    assert open_store(tmp_path).examples["row"][:] == [0, 1, 2]


def test_what_was_clipped_is_counted_over_all_shards(tmp_path: Path) -> None:
    with create_store(tmp_path / "run", manifest(rows=32, dtype="float16")) as writer:
        matrix = rows(range(16))
        matrix[0, :3] = 1e9
        matrix[1, 0] = torch.nan
        writer.put(0, matrix, examples(range(16)))
    with create_store(tmp_path / "run", manifest(rows=32, dtype="float16")) as writer:
        matrix = rows(range(16, 32))
        matrix[7, 7] = -1e9
        writer.put(1, matrix, examples(range(16, 32)))
        done = writer.finish()
        assert (writer.clipped, writer.nonfinite) == (4, 1)
    assert (done.clipped, done.nonfinite) == (4, 1)
    assert open_store(tmp_path / "run").manifest == done


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.bfloat16])
def test_rows_may_come_in_any_float_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    with create_store(tmp_path / "run", manifest(rows=16)) as writer:
        writer.put(0, rows(range(16)).to(dtype).requires_grad_(), examples(range(16)))
        writer.finish()
    assert (open_store(tmp_path / "run").matrix()[:] == rows(range(16)).to(dtype).float().numpy()).all()


def test_what_put_refuses(tmp_path: Path) -> None:
    with create_store(tmp_path / "run", manifest()) as writer:
        for shard in (-1, 5):
            with pytest.raises(StoreError, match=f"expected the number of a pending shard, found {shard}"):
                writer.put(shard, rows(range(16)), {})
        with pytest.raises(
            StoreError, match=r"shard 0 as floats of shape \(16, 64\), found torch\.float32 of \(15, 64\)"
        ):
            writer.put(0, rows(range(15)), examples(range(15)))
        with pytest.raises(StoreError, match=r"found torch\.int64"):
            writer.put(0, torch.zeros(16, 64, dtype=torch.long), examples(range(16)))
        with pytest.raises(StoreError, match="expected 16 entries in the examples' column 'id', found 15"):
            writer.put(0, rows(range(16)), examples(range(15)))
        with pytest.raises(StoreError, match="the examples' column 'mixed' must have values of one type"):
            writer.put(0, rows(range(16)), {"mixed": [1, "a"] * 8})
        assert writer.pending == [0, 1, 2, 3, 4]
        writer.put(0, rows(range(16)), examples(range(16)))
        with pytest.raises(StoreError, match="found 0; see `pending`"):
            writer.put(0, rows(range(16)), examples(range(16)))
        with pytest.raises(StoreError, match="4 of 5 shards are not written yet: 1, 2, 3, 4"):
            writer.finish()
    with pytest.raises(StoreError, match="the writer is closed"):
        writer.put(1, rows(range(16, 32)), examples(range(16, 32)))


def test_writing_overlaps_computing_and_waits_when_three_shards_are_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_go, handed, real = threading.Event(), [], write_shard.write_shard

    def slow(*args: object) -> object:
        let_go.wait(OUTER_LIMIT)
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(writer, "write_shard", slow)

    def compute() -> None:
        for shard in open_writer.pending:
            span = open_writer.shard_range(shard)
            open_writer.put(shard, rows(span), examples(span))
            handed.append(shard)

    with create_store(tmp_path / "run", manifest()) as open_writer:
        thread = threading.Thread(target=compute)
        thread.start()
        until(lambda: len(handed) == 3)
        time.sleep(0.2)  # time for a fourth, were it not held back
        assert handed == [0, 1, 2]  # one being written, two waiting
        let_go.set()
        thread.join()
        assert open_writer.finish().complete
    assert [thread.name for thread in threading.enumerate() if "funcattrib" in thread.name] == []


def test_an_error_of_the_thread_is_raised_once_and_by_the_next_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object) -> object:
        raise RuntimeError("a mistake of ours")

    monkeypatch.setattr(writer, "write_shard", broken)
    with pytest.raises(RuntimeError, match="a mistake of ours"), create_store(tmp_path / "run", manifest()) as one:
        one.put(0, rows(range(16)), examples(range(16)))  # raised on leaving
    with create_store(tmp_path / "run", manifest()) as one:
        one.put(0, rows(range(16)), examples(range(16)))
        with pytest.raises(RuntimeError):
            one.finish()
        with pytest.raises(RuntimeError):
            one.put(1, rows(range(16, 32)), examples(range(16, 32)))
    with pytest.raises(KeyError), create_store(tmp_path / "run", manifest()) as one:  # the first error is the one seen
        one.put(0, rows(range(16)), examples(range(16)))
        raise KeyError
    assert not (tmp_path / "run/lock").exists()


def test_a_state_of_views_and_shared_memory(tmp_path: Path) -> None:
    with create_store(tmp_path / "run", manifest()) as one:
        assert one.load_state() is None
        base = torch.arange(6.0).view(2, 3)
        one.save_state({"a": base, "same": base, "transposed": base.T, "part": base[1], "none": torch.zeros(0)})
        state = one.load_state()
    assert state is not None
    assert (state["same"] == base).all()
    assert (state["transposed"] == base.T).all()
    assert (state["part"] == base[1]).all()
    assert state["none"].shape == (0,)


def test_a_manifest_survives_json() -> None:
    one = manifest(extra={"ö": [1.5, None]})
    again = Manifest.from_json(one.to_json())
    assert again.leaves == one.leaves
    assert again.extra == one.extra
    assert differences(one, again) == []  # a tuple among the settings has become a list, which is no difference
    assert Manifest.from_json(again.to_json()) == again
    with pytest.raises(StoreError, match="the manifest takes JSON values only"):
        manifest(extra={"path": Path()}).to_json()
    with pytest.raises(StoreError, match="the manifest takes JSON values only"):
        identity(manifest(loss={"clip": float("inf")}))


def test_differences_name_every_place() -> None:
    one = manifest(model={"id": "a", "only": 1}, loss={"kind": "x" * 99})
    two = manifest(model={"id": "a", "other": None}, chain=[{"name": "project", "dim": 9, "shape": [3, 4]}, {}])
    assert differences(one, two) == [
        "model.only: expected 1, found nothing",
        "model.other: expected nothing, found null",
        f'loss.kind: expected "{"x" * 56}…, found "ce"',
        'loss.reduction: expected nothing, found "sum"',
        "chain[0].dim: expected 8, found 9",
        'chain[1].name: expected "unit_norm", found nothing',
    ]
    assert differences(one, manifest(model=one.model, loss=one.loss, extra={"a": 1}, complete=True)) == []

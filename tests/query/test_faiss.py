"""FAISS indexes against exact search, and their cache."""

from __future__ import annotations

import builtins
import dataclasses
import errno
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from funcattrib.errors import FuncattribError
from funcattrib.query.faiss_index import FaissConfig, FaissIndex, build_or_load, search
from funcattrib.query.topk import store_blocks, topk
from funcattrib.store import GradientStore, LeafColumns, Manifest, create_store, open_store
from tests.support import processes

faiss = pytest.importorskip("faiss")

WIDTH = 32


def rows_of(count: int = 1200, seed: int = 0) -> Tensor:
    """Clustered rows of different lengths: what lists and codes are made for."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(20, WIDTH, generator=generator)
    rows = centres[torch.arange(count) % 20] + 0.5 * torch.randn(count, WIDTH, generator=generator)
    return rows * (0.1 + torch.rand(count, 1, generator=generator))


def make_store(path: Path, matrix: Tensor, dtype: str = "float16", *, shard: int = 500) -> GradientStore:
    manifest = Manifest(
        model={"id": "none"},
        data={"id": "none"},
        chain=[],
        seed=0,
        leaves=[LeafColumns("w", (matrix.shape[1],), 0, matrix.shape[1])],
        dtype=dtype,
        loss={},
        rows=len(matrix),
        rows_per_shard=shard,
    )
    with create_store(path, manifest) as writer:
        for number in writer.pending:
            rows = writer.shard_range(number)
            writer.put(number, matrix[rows.start : rows.stop], {"id": list(rows)})
        writer.finish()
    return open_store(path)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> GradientStore:
    return make_store(tmp_path_factory.mktemp("run") / "store", rows_of())


def queries_of(count: int = 9) -> Tensor:
    return rows_of(count, seed=1)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "int8"])
@pytest.mark.parametrize("metric", ["ip", "cosine"])
@pytest.mark.parametrize("mmap", [False, True])
def test_flat_ranks_as_exact_search(tmp_path: Path, dtype: str, metric: Any, mmap: bool) -> None:
    store = make_store(tmp_path / "store", rows_of(700), dtype)
    index = build_or_load(store, FaissConfig("Flat", mmap_index=mmap), metric=metric)
    assert index.recall == 1.0
    for largest in (True, False):
        exact = topk(store_blocks(store), queries_of(), 12, unit_norm=metric == "cosine", largest=largest)
        found = search(index, queries_of(), 12, largest=largest)
        if metric == "cosine":  # a cosine index takes queries of any length, too
            assert torch.equal(search(index, 1e-3 * queries_of(), 12, largest=largest).rows, found.rows)
        torch.testing.assert_close(found.values, exact.values, rtol=1e-5, atol=1e-6)
        assert torch.equal(found.rows, exact.rows)
    assert search(index, queries_of(), 5000).rows.shape == (9, 700)


@pytest.mark.parametrize(
    ("factory", "least"),
    [
        ("IVF1,SQfp16", 0.99),
        ("IVF16,Flat", 0.9),
        ("IVF16,PQ8", 0.3),
        ("PQ16", 0.3),
        ("HNSW32", 0.6),
        ("PCA16,IVF4,SQ8", 0.3),
        ("OPQ8,IVF4,PQ8,RFlat", 0.5),
    ],
)
@pytest.mark.parametrize("mmap", [False, True])
def test_factory_strings(store: GradientStore, tmp_path: Path, factory: str, least: float, mmap: bool) -> None:
    lines: list[str] = []
    config = FaissConfig(factory, mmap_index=mmap)
    built = build_or_load(store, config, metric="cosine", cache=tmp_path, say=lines.append)
    assert built.built
    assert built.recall >= least
    assert len(lines) == 1
    assert f"built FAISS index {factory} of 1,200 rows: recall@10 {built.recall:.3f}" in lines[0]
    loaded = build_or_load(store, config, metric="cosine", cache=tmp_path, say=lines.append)
    assert (loaded.built, loaded.recall, loaded.path, len(lines)) == (False, built.recall, built.path, 1)
    one, two = (search(index, queries_of(), 10) for index in (built, loaded))
    assert torch.equal(one.rows, two.rows)
    assert torch.equal(one.values, two.values)
    assert (one.values[:, :-1] >= one.values[:, 1:]).all()
    assert one.values.dtype == torch.float32
    assert one.rows.dtype == torch.int64


def test_training_a_quantizer_takes_no_longer_than_it_must(store: GradientStore, tmp_path: Path) -> None:
    """FAISS' factory adds seconds of annealing per sub-quantizer, for a filter that is not used."""
    faiss = pytest.importorskip("faiss")
    built = build_or_load(store, FaissConfig("PCA32,IVF4,PQ32"), cache=tmp_path)
    quantizer = faiss.downcast_index(faiss.extract_index_ivf(built.index))
    assert quantizer.do_polysemous_training is False


def test_recall_is_what_a_user_would_measure(store: GradientStore, tmp_path: Path) -> None:
    """A crude index says so; visiting all its lists repairs it."""
    crude = build_or_load(store, FaissConfig("IVF16,Flat", nprobe=1), cache=tmp_path)
    thorough = build_or_load(store, FaissConfig("IVF16,Flat", nprobe=16), cache=tmp_path)
    assert crude.recall < thorough.recall == 1.0


def test_equal_rows_do_not_lower_the_recall(tmp_path: Path) -> None:
    matrix = rows_of(10).repeat(40, 1)
    matrix[::3] = 0
    assert build_or_load(make_store(tmp_path / "s", matrix)).recall == 1.0
    assert build_or_load(make_store(tmp_path / "one", matrix[1:2])).recall == 1.0


def test_lists_that_hold_too_few_are_made_up_for(store: GradientStore, tmp_path: Path) -> None:
    index = build_or_load(store, FaissConfig("IVF64,Flat", nprobe=1), cache=tmp_path)
    found = search(index, queries_of(), 400)
    assert (found.rows >= 0).all()
    assert all(len(set(rows)) == 400 for rows in found.rows.tolist())


def test_the_key_is_content_and_every_setting(store: GradientStore, tmp_path: Path) -> None:
    base = FaissConfig("Flat")
    other: dict[str, Any] = {"index_factory": "SQ8", "mmap_index": True, "sample_rows": 999, "nprobe": 3}
    other |= {"ef_search": 65, "seed": 1}
    assert set(other) | {"device"} == {field.name for field in dataclasses.fields(FaissConfig)}
    paths = {
        build_or_load(store, base, cache=tmp_path).path,
        build_or_load(store, metric="cosine", cache=tmp_path).path,
    }
    for name, value in other.items():
        paths.add(build_or_load(store, dataclasses.replace(base, **{name: value}), cache=tmp_path).path)
    assert len(paths) == 2 + len(other)
    altered = rows_of()
    altered[700, 3] += 1
    for number, changed in enumerate([altered, rows_of(1199)]):
        path = build_or_load(make_store(tmp_path / f"store{number}", changed), base, cache=tmp_path).path
        assert path not in paths
    same = make_store(tmp_path / "same", rows_of())
    assert build_or_load(same, base, cache=tmp_path).path in paths


@pytest.mark.parametrize("harm", ["flip", "truncate", "empty", "no index", "no meta", "half a meta", "file, no folder"])
@pytest.mark.parametrize("mmap", [False, True])
def test_a_corrupted_cache_is_rebuilt_with_a_line(store: GradientStore, tmp_path: Path, harm: str, mmap: bool) -> None:
    config = FaissConfig("IVF4,SQfp16", mmap_index=mmap)
    good = search(build_or_load(store, config, cache=tmp_path), queries_of(), 5)
    (folder,) = tmp_path.iterdir()
    file, meta = folder / "index.faiss", folder / "meta.json"
    content = file.read_bytes()
    file.unlink()  # a mapped file is replaced, not written to
    if harm in ("flip", "truncate", "empty"):
        flipped = content[:40] + bytes([content[40] ^ 8]) + content[41:]
        file.write_bytes({"flip": flipped, "truncate": content[: len(content) // 2], "empty": b""}[harm])
    elif harm == "no meta":
        file.write_bytes(content)
        meta.unlink()
    elif harm == "half a meta":
        file.write_bytes(content)
        meta.write_text(meta.read_text()[:30])
    elif harm == "file, no folder":
        meta.unlink()
        folder.rmdir()
        folder.write_bytes(content)
    lines: list[str] = []
    index = build_or_load(store, config, cache=tmp_path, say=lines.append)
    assert index.built
    assert len(lines) == 2
    assert "cannot be used" in lines[0]
    assert "building it again" in lines[0]
    assert torch.equal(search(index, queries_of(), 5).rows, good.rows)
    assert not build_or_load(store, config, cache=tmp_path).built


def test_by_default_the_index_lies_beside_the_store(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = make_store(tmp_path / "run", rows_of(300))
    with caplog.at_level("INFO"):
        index = build_or_load(store)
    assert index.path.parent == tmp_path / "run" / "faiss"
    assert sorted(file.name for file in index.path.iterdir()) == ["index.faiss", "meta.json"]
    assert list(index.path.parent.iterdir()) == [index.path]
    assert "recall@10 1.000" in caplog.text
    assert json.loads((index.path / "meta.json").read_text())["index_factory"] == "Flat"
    assert open_store(tmp_path / "run", verify=True).manifest.complete


@pytest.mark.parametrize("factory", ["Flat", "IVF4,PQ4x4", "HNSW32", "SQ8", "PCA16,IVF4,SQfp16", "IVF1,SQfp16"])
@pytest.mark.parametrize("metric", ["ip", "cosine"])
@pytest.mark.parametrize("largest", [True, False])
def test_rows_that_are_not_finite_come_last(tmp_path: Path, factory: str, metric: Any, largest: bool) -> None:
    matrix, bad = rows_of(400), [0, 7, 9, 399]
    matrix[bad, [0, 3, 0, 31]] = torch.tensor([torch.nan, torch.nan, torch.inf, -torch.inf])
    store = make_store(tmp_path / "store", matrix, "float32", shard=150)
    config, finite = FaissConfig(factory, ef_search=500), [row for row in range(400) if row not in bad]
    built, loaded = (build_or_load(store, config, metric=metric) for _ in range(2))
    assert not loaded.built
    without = build_or_load(make_store(tmp_path / "without", matrix[finite], "float32"), config, metric=metric)
    expected = search(without, queries_of(2), 10, largest=largest)
    for index in (built, loaded):
        assert index.recall == without.recall
        found = search(index, queries_of(2), 10, largest=largest)
        torch.testing.assert_close(found.values, expected.values)
        assert found.rows.tolist() == [[finite[row] for row in rows] for rows in expected.rows.tolist()]
        everything = search(index, queries_of(2), 500, largest=largest)
        assert everything.rows[:, -4:].tolist() == [bad, bad]
        assert everything.values[:, -4:].isnan().all()
        assert not np.isin(everything.rows[:, :-4], bad).any()


def test_a_store_without_a_finite_row_is_searched(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", torch.full((3, WIDTH), torch.nan), "int8")
    found = search(build_or_load(store), queries_of(2), 2)
    assert found.rows.tolist() == [[0, 1], [0, 1]]
    assert found.values.isnan().all()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (FaissConfig("Nonsense"), "could not make the index 'Nonsense': could not parse index string"),
        (FaissConfig("PQ7"), "multiple of the number of subquantizers"),
        (FaissConfig("IVF512,Flat", sample_rows=100), r"points \(100\) should be at least .* \(512\); use another"),
        (FaissConfig(sample_rows=0), "sample_rows of at least 1, found 0"),
        (FaissConfig(nprobe=0), "nprobe of at least 1"),
        (FaissConfig(device="tpu"), "expected device cpu, cuda or cuda:N, found 'tpu'"),
        (FaissConfig(device="cuda:99"), "device 'cuda:99' is not available: FAISS sees"),
    ],
)
def test_refusals(store: GradientStore, tmp_path: Path, config: FaissConfig, message: str) -> None:
    with pytest.raises(FuncattribError, match=message) as caught:
        build_or_load(store, config, cache=tmp_path / "cache")
    assert "\n" not in str(caught.value)
    assert ".cpp" not in str(caught.value)


def test_refusals_of_a_search(store: GradientStore, tmp_path: Path) -> None:
    index = build_or_load(store, cache=tmp_path)
    with pytest.raises(FuncattribError, match=r"as wide as the index \(32\)"):
        search(index, torch.ones(2, 3), 1)
    with pytest.raises(FuncattribError, match="k of at least 1"):
        search(index, torch.ones(2, WIDTH), 0)
    with pytest.raises(FuncattribError, match=r"queries \[1\] are NaN or infinite"):
        search(index, torch.tensor([[0.0], [torch.nan]]).expand(2, WIDTH), 1)
    with pytest.raises(FuncattribError, match="expected metric ip or cosine"):
        build_or_load(store, metric="l2")  # type: ignore[arg-type]


def test_a_cache_that_cannot_be_written_says_so(store: GradientStore, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FuncattribError, match="could not be written to"):
        build_or_load(store, cache=tmp_path / "file" / "cache")


@pytest.mark.parametrize("mmap", [False, True])
def test_a_store_that_is_read_only_is_searched_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mmap: bool
) -> None:
    store = make_store(tmp_path / "run", rows_of(60))
    made = Path.mkdir

    def refuse(path: Path, *given: Any, **named: Any) -> None:
        if tmp_path in path.parents:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        made(path, *given, **named)

    monkeypatch.setattr(Path, "mkdir", refuse)
    lines: list[str] = []
    index = build_or_load(store, FaissConfig(mmap_index=mmap), say=lines.append)
    assert torch.equal(search(index, queries_of(), 3).rows, topk(store_blocks(store), queries_of(), 3).rows)
    assert "faiss is read-only: the index is in memory, and is built again each time" in lines[0]
    assert not (tmp_path / "run/faiss").exists()


def test_without_faiss_the_extra_is_named(store: GradientStore, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def absent(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "faiss":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(FuncattribError, match=r"funcattrib\[cpu\]"):
        build_or_load(store)


def test_faiss_is_not_imported_before_it_is_asked_for() -> None:
    """Nor by anything else that is imported to build a store."""
    program = "import sys, funcattrib.query; print('faiss' in sys.modules)"
    assert processes.start("-c", program).wait() == (0, "False\n")


@pytest.mark.skipif(not getattr(faiss, "get_num_gpus", lambda: 0)(), reason="FAISS sees no GPU")
def test_on_a_gpu(store: GradientStore, tmp_path: Path) -> None:
    def found(device: str, factory: str) -> FaissIndex:
        return build_or_load(store, FaissConfig(factory, device=device), cache=tmp_path)

    for factory in ("Flat", "IVF1,SQfp16", "HNSW32"):
        one, two = (search(found(device, factory), queries_of(), 10) for device in ("cpu", "cuda"))
        assert (one.rows == two.rows).float().mean() > 0.9

"""Reading: rows over many shards indexed like one array, mapped and not loaded."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from funcattrib.errors import StoreError
from funcattrib.store import GradientStore, atomic, create_store, encode, lay_out, open_store
from funcattrib.store.encode import decode
from tests.support.store_run import examples, manifest, rows, write

DTYPES = ["float16", "float32", "bfloat16", "int8"]
ROWS = slice(None)


@pytest.fixture(scope="module", params=DTYPES)
def opened(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[GradientStore, np.ndarray]:
    store = open_store(write(tmp_path_factory.mktemp("store") / "run", dtype=request.param), verify=True)
    array, scale, *_ = encode(rows(range(70)), request.param)
    return store, decode(array, request.param, scale).numpy()


INDICES = [
    0, -1, 69, np.int64(17), slice(None), slice(3, 9), slice(10, 50), slice(-20, None), slice(64, 1000), slice(50, 10),
    slice(None, None, 7), slice(None, None, -1), slice(60, 3, -9), [], [5], [69, 0, 17, 17, -1], np.array([16, 15]),
    np.arange(70) % 3 == 0, ..., (3, 5), (3, slice(2, 7)), (ROWS, 0), (ROWS, -1), (ROWS, slice(40, 60)),
    (ROWS, slice(None, None, -3)), (slice(10, 40), slice(60, 10)), ([1, 69, 20], slice(2, 5)), ([1, 69], 4), (..., 3),
    (slice(14, 18), ...), (2, ...), (np.arange(70) > 60, slice(1, 3)),
]  # fmt: skip


@pytest.mark.parametrize("index", INDICES, ids=str)
def test_the_matrix_is_indexed_like_an_array(opened: tuple[GradientStore, np.ndarray], index: object) -> None:
    store, expected = opened
    found, wanted = store.matrix()[index], expected[index]  # type: ignore[index]
    assert found.dtype == (np.float16 if store.manifest.dtype == "float16" else np.float32)
    assert found.shape == wanted.shape
    assert (found == wanted).all()


LEAF_INDICES = [
    0, slice(None), slice(10, 40), [69, 0, 17], (3, 1), (3, 1, 2), (ROWS, slice(1, 3)), (ROWS, ROWS, 2), (..., 1),
    (slice(10, 40), 2, slice(None, None, -1)), ([5, 60], slice(0, 2), 3),
]  # fmt: skip


@pytest.mark.parametrize("index", LEAF_INDICES, ids=str)
def test_a_leaf_is_indexed_like_an_array(opened: tuple[GradientStore, np.ndarray], index: object) -> None:
    store, expected = opened
    leaf = expected[:, 40:64].reshape(70, 3, 8)
    assert store["1.weight"].shape == (70, 3, 8)
    assert store["1.weight"][index].shape == leaf[index].shape  # type: ignore[index]
    assert (store["1.weight"][index] == leaf[index]).all()  # type: ignore[index]


def test_tensors_blocks_and_gradients(opened: tuple[GradientStore, np.ndarray]) -> None:
    store, expected = opened
    matrix = store.matrix()
    for span in ((0, None), (3, 9), (10, 50), (64, 99), (-5, None), (50, 10)):
        found = matrix.tensor(*span)
        assert found.dtype == torch.float32
        assert (found.numpy() == expected[slice(*span)]).all()
    for size in (1, 5, 16, 1000):
        blocks = list(matrix.blocks(size))
        assert max(len(block) for block in blocks) == min(size, 16)
        assert (torch.cat(blocks).float().numpy() == expected).all()
    stored = {"float16": torch.float16, "bfloat16": torch.bfloat16}
    assert blocks[0].dtype == stored.get(store.manifest.dtype, torch.float32)
    assert (store.gradients("0.bias").numpy() == expected[:, 32:40]).all()
    assert (torch.cat(list(store["0.weight"].blocks(9))).float().numpy() == expected[:, :32].reshape(70, 8, 4)).all()
    assert (np.asarray(matrix) == expected).all()
    assert np.asarray(matrix, dtype=np.float64).dtype == np.float64
    assert (np.stack(list(matrix)) == expected).all()


def test_what_a_store_tells(opened: tuple[GradientStore, np.ndarray]) -> None:
    store, _ = opened
    assert (len(store), store.width) == (70, 64)
    assert list(store.leaves) == ["0.weight", "0.bias", "1.weight"]
    assert store.leaves["1.weight"] == ("1.weight", (3, 8), 40, 64)
    assert "0.bias" in store
    assert store.examples[17]["text"] == "document 17"
    assert store.examples["loss"][:] == [row / 8 for row in range(70)]
    assert store.state()["moments"].tolist() == [0, 1, 2, 3, 4]
    assert store.config == {"seed": 0, "model": "tiny"}
    assert store.manifest.complete
    assert store.manifest.extra == {}


def test_wrong_indices(opened: tuple[GradientStore, np.ndarray]) -> None:
    store, _ = opened
    matrix = store.matrix()
    wrong: list[object] = [70, -71, [0, 70], [-71], np.zeros(3, dtype=bool)]
    for index in wrong:
        with pytest.raises(IndexError, match="70"):
            matrix[index]
    for index in ("a", [0.5], [[1]], (ROWS, [1, 2]), None):
        with pytest.raises(TypeError):
            matrix[index]
    with pytest.raises(IndexError):
        matrix[0, 64]
    with pytest.raises(StoreError, match="at least one row"):
        next(matrix.blocks(0))
    with pytest.raises(
        StoreError, match=r"expected one of the 3 leaves of .*, found '1\.wieght'; did you mean '1\.weight'"
    ):
        store["1.wieght"]


def _is_mapped(name: str) -> bool:
    return any(name in line for line in Path("/proc/self/maps").read_text().splitlines())


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc to see what is mapped")
@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16"])
def test_blocks_and_views_are_the_file_itself(tmp_path: Path, dtype: str) -> None:
    store = open_store(write(tmp_path / "run", dtype=dtype))
    before = (tmp_path / "run/shards/00000.npy").read_bytes()
    block = next(store.matrix().blocks(4))
    assert _is_mapped(f"{tmp_path}/run/shards/00000.npy")
    block.zero_()  # the reader's own copy of the page
    assert (tmp_path / "run/shards/00000.npy").read_bytes() == before
    assert next(store.matrix().blocks(4)).any()
    if dtype != "bfloat16":
        view = store["1.weight"][17:20]
        assert _is_mapped(f"{tmp_path}/run/shards/00001.npy")
        assert not view.flags.owndata
        assert view.strides == tuple(step * view.itemsize for step in (64, 8, 1))
        with pytest.raises(ValueError, match="read-only"):
            view[0] = 0
        del view
    del block
    assert not _is_mapped(f"{tmp_path}/run/shards")


def test_examples_take_one_type_over_all_shards(tmp_path: Path) -> None:
    with create_store(tmp_path / "run", manifest(rows=32)) as writer:
        writer.put(0, rows(range(16)), {**examples(range(16)), "reward": [None] * 16, "score": list(range(16))})
        odd = {"reward": ["x"] * 16, "score": np.linspace(0, 1, 16), "vector": torch.ones(16, 2)}
        writer.put(1, rows(range(16, 32)), {**examples(range(16, 32)), **odd})
        writer.finish()
    found = open_store(tmp_path / "run").examples
    assert found["reward"][:] == [None] * 16 + ["x"] * 16
    assert found[3]["score"] == 3.0
    assert found[31]["score"] == 1.0
    assert [found[0]["vector"], found[31]["vector"]] == [None, [1.0, 1.0]]


def _opens(event: str, function: object) -> bool:
    return event == "c_call" and getattr(function, "__name__", "") == "open"


@pytest.mark.slow
def test_ten_thousand_shards_open_without_a_look_into_any(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count = 10_000
    monkeypatch.setattr(atomic, "_flush", lambda path: None)  # waiting for the disk is not what is measured
    settings = {"rows": count, "rows_per_shard": 1, "leaves": lay_out({"w": (4,)})}
    with create_store(tmp_path / "run", manifest(**settings)) as writer:
        for shard in writer.pending:
            writer.put(shard, torch.full((1, 4), float(shard)), {"id": [shard]})
        writer.finish()
    assert len(list((tmp_path / "run/shards").iterdir())) == count
    opened: list[object] = []
    sys.setprofile(lambda _, event, function: opened.append(function) if _opens(event, function) else None)
    try:
        store = open_store(tmp_path / "run")
    finally:
        sys.setprofile(None)
    assert 0 < len(opened) < 10
    assert len(store) == count
    descriptors = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
    blocks = list(store.matrix().blocks(100))
    assert torch.cat(blocks)[:, 0].tolist() == [*range(count)]
    assert store.matrix()[[9_999, 5], 0].tolist() == [9_999, 5]
    assert store.examples[9_999]["id"] == 9_999
    if descriptors:
        assert len(os.listdir("/proc/self/fd")) < descriptors + 20

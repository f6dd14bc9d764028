"""What was cut short, altered, exchanged, or never was a store, is found and named."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from funcattrib.errors import StoreError
from funcattrib.store import create_store, open_store, verify
from tests.support.store_run import contents, examples, manifest, rows, write


@pytest.mark.parametrize("name", ["shards/00001.npy", "shards/00001.scale.npy", "examples/00003.arrow"])
def test_a_truncated_file_is_found_on_opening(tmp_path: Path, name: str) -> None:
    file = write(tmp_path / "run", dtype="int8") / name
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(StoreError) as caught:
        open_store(tmp_path / "run")
    assert f"{name}: expected {size:,} bytes, found {size - 1:,} bytes\ndelete that shard's file and" in str(
        caught.value
    )
    assert verify(tmp_path / "run") == [f"{name}: expected {size:,} bytes, found {size - 1:,}"]
    file.unlink()
    with pytest.raises(StoreError, match=f"{name}: expected .* found no file"):
        open_store(tmp_path / "run")
    assert verify(tmp_path / "run") == [f"{name}: expected {size:,} bytes, found: No such file or directory"]


@pytest.mark.parametrize("name", ["shards/00001.npy", "shards/00001.scale.npy", "examples/00003.arrow"])
def test_an_altered_byte_is_found_by_verifying(tmp_path: Path, name: str) -> None:
    run = write(tmp_path / "run", dtype="int8")
    content = bytearray((run / name).read_bytes())
    content[-1] ^= 1
    (run / name).write_bytes(content)
    open_store(run)
    [problem] = verify(run)
    assert problem.startswith(f"{name}: expected the content hash")
    with pytest.raises(StoreError, match="it was altered"):
        open_store(run, verify=True)
    (run / name).unlink()  # the cure that the error names
    write(run, dtype="int8")
    assert verify(run) == []


def test_a_truncated_shard_of_an_unfinished_store_is_found(tmp_path: Path) -> None:
    with create_store(tmp_path / "run", manifest()) as writer:
        writer.put(2, rows(range(32, 48)), examples(range(32, 48)))
    (tmp_path / "run/shards/00002.npy").write_bytes(b"")
    with pytest.raises(StoreError, match=r"shards/00002\.npy: expected .* found 0 bytes"):
        open_store(tmp_path / "run")


def test_an_altered_state_is_found(tmp_path: Path) -> None:
    run = write(tmp_path / "run")
    content = bytearray((run / "state.safetensors").read_bytes())
    content[-1] ^= 1
    (run / "state.safetensors").write_bytes(content)
    assert [problem.split(":")[0] for problem in verify(run)] == ["state.safetensors"]
    (run / "state.safetensors").unlink()
    with pytest.raises(StoreError, match=r"state\.safetensors: expected"):
        open_store(run)


def test_a_shard_that_changes_after_opening_is_found_on_reading(tmp_path: Path) -> None:
    store = open_store(write(tmp_path / "run"))
    file = tmp_path / "run/shards/00000.npy"
    good = file.read_bytes()
    for content, found in (
        (good[:-4], "expected 4,224 bytes"),
        (b"", "cannot be read as the rows of a shard"),
        (good.replace(b"(16, 64)", b"(64, 16)"), "of shape"),
        (good.replace(b"<f4", b"|O8"), "object of shape"),
        (pickle.dumps(np.zeros(3)), "cannot be read as the rows of a shard: the magic string"),
    ):
        file.write_bytes(content)
        with pytest.raises(StoreError, match=found):
            store.matrix()[0]


def test_files_that_do_not_fit_the_manifest_are_found(tmp_path: Path) -> None:
    run = write(tmp_path / "run")
    text = (run / "manifest.json").read_text()
    (run / "manifest.json").write_text(text.replace('"dtype": "float32"', '"dtype": "float16"'))
    assert all("float32 of shape" in problem for problem in verify(run))
    assert len(verify(run)) == 5


def test_a_manifest_cannot_point_outside_its_folder(tmp_path: Path) -> None:
    run = write(tmp_path / "run")
    text = (run / "manifest.json").read_text()
    (run / "manifest.json").write_text(text.replace("shards/00001.npy", "../secret.npy"))
    with pytest.raises(StoreError, match=r"expected shard 1 in shards/00001.npy, found \.\./secret\.npy"):
        open_store(run)


def test_what_is_no_store_says_so(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="none is not a store: it does not exist; build one"):
        open_store(tmp_path / "none")
    with pytest.raises(StoreError, match=r"is not a store: it has no manifest\.json"):
        open_store(tmp_path)
    for text, found in (
        ("{", "not valid JSON"),
        ("[]", "not the manifest of a store"),
        ('{"name": "app", "icons": []}', "not the manifest of a store"),
        ("\xff", "not valid JSON"),
    ):
        (tmp_path / "manifest.json").write_text(text)
        for use in (open_store, verify, lambda path: create_store(path, manifest(), overwrite=True)):
            with pytest.raises(StoreError, match=found):
                use(tmp_path)
    (tmp_path / "manifest.json").write_bytes(b"\xff\xfe")
    with pytest.raises(StoreError, match=r"manifest\.json"):
        open_store(tmp_path)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_something_else_is_never_written_to(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards/00000.npy").write_bytes(b"mine")
    (tmp_path / "letter.txt").write_text("dear")
    before = contents(tmp_path)
    with pytest.raises(
        StoreError, match=r"is no store: it has letter.txt and 1 more and no manifest.json\nchoose another RUN"
    ):
        create_store(tmp_path, manifest(), overwrite=overwrite)
    with pytest.raises(StoreError, match=r"letter.txt is a file; choose another folder"):
        create_store(tmp_path / "letter.txt", manifest(), overwrite=overwrite)
    with pytest.raises(StoreError, match="Not a directory"):
        create_store(tmp_path / "letter.txt/run", manifest(), overwrite=overwrite)
    assert contents(tmp_path) == before


def test_a_newer_store_says_so(tmp_path: Path) -> None:
    run = write(tmp_path / "run")
    values = json.loads((run / "manifest.json").read_text())
    values.update(format_version=2, funcattrib_version="9.0", leaves="of another kind")
    (run / "manifest.json").write_text(json.dumps(values))
    for use in (open_store, verify, lambda path: create_store(path, manifest(), overwrite=True)):
        with pytest.raises(StoreError, match=r"expected format version 1, found 2 \(written by funcattrib 9\.0"):
            use(run)


def test_a_field_of_a_later_release_is_passed_over(tmp_path: Path) -> None:
    run = write(tmp_path / "run")
    values = json.loads((run / "manifest.json").read_text())
    (run / "manifest.json").write_text(json.dumps({**values, "later": 1}))
    assert len(open_store(run, verify=True)) == 70


@pytest.mark.parametrize(
    ("key", "value", "found"),
    [
        ("leaves", [], "the rows have no leaves"),
        ("leaves", [{"name": "a", "shape": [4], "start": 1, "stop": 5}], "gaps"),
        ("leaves", [{"name": "a", "shape": [4]}], "damaged at 'start'"),
        ("dtype", "float8", "expected a store dtype"),
        ("rows", 1000, "all 63 shards listed"),
        ("rows_per_shard", 0, "rows_per_shard >= 1"),
        ("rows", "many", "damaged"),
        ("shards", [{}], "damaged"),
    ],
)
def test_a_damaged_manifest_says_where(tmp_path: Path, key: str, value: object, found: str) -> None:
    run = write(tmp_path / "run")
    values = json.loads((run / "manifest.json").read_text())
    (run / "manifest.json").write_text(json.dumps({**values, key: value}))
    with pytest.raises(StoreError, match=found):
        open_store(run)

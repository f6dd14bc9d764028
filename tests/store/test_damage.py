"""What was cut short, altered, exchanged, or never was a store, is found and named."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from funcattrib.errors import StoreError
from funcattrib.store import create_store, open_store, read_manifest, verify
from funcattrib.store.json_values import with_checksum
from funcattrib.store.progress_files import load_parts, save_parts
from tests.support.store_run import contents, edit_manifest, examples, fill, manifest, rows, write


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
    edit_manifest(run, dtype="float16")
    assert all("float32 of shape" in problem for problem in verify(run))
    assert len(verify(run)) == 5


def test_a_manifest_cannot_point_outside_its_folder(tmp_path: Path) -> None:
    run = write(tmp_path / "run")
    shards = json.loads((run / "manifest.json").read_text())["shards"]
    edit_manifest(run, shards=[shards[0], {**shards[1], "file": "../secret.npy"}, *shards[2:]])
    with pytest.raises(StoreError, match=r"expected shard 1 in shards/00001.npy, found \.\./secret\.npy"):
        open_store(run)


def test_what_is_no_store_says_so(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="none is not a store: it does not exist; build one"):
        open_store(tmp_path / "none")
    with pytest.raises(StoreError, match=r"is not a store: it has no manifest\.json; give the folder of a run$"):
        open_store(tmp_path)
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(StoreError, match=r"file is not a store: it is a file; give the folder of a run$"):
        open_store(file)
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
    edit_manifest(run, format_version=2, funcattrib_version="9.0", leaves="of another kind")
    for use in (open_store, verify, lambda path: create_store(path, manifest(), overwrite=True)):
        with pytest.raises(StoreError, match=r"expected format version 1, found 2 \(written by funcattrib 9\.0"):
            use(run)


def test_a_field_of_a_later_release_is_passed_over(tmp_path: Path) -> None:
    run = write(tmp_path / "run")
    values = json.loads((run / "manifest.json").read_text())
    del values["checksum"]
    (run / "manifest.json").write_text(json.dumps(with_checksum({**values, "later": 1})))
    assert len(open_store(run, verify=True)) == 70


@pytest.mark.parametrize(
    ("key", "value", "found"),
    [
        ("leaves", [], "the rows have no leaves"),
        ("leaves", [{"name": "a", "shape": [4], "start": 1, "stop": 5}], "gaps"),
        ("leaves", [{"name": "a", "shape": [4]}], r"damaged: leaves\[0\]\.start is missing"),
        ("leaves", [{"name": "a", "shape": [-4], "start": 0, "stop": -4}], "below zero"),
        ("shards", [{"file": []}], r"damaged: shards\[0\]\.start is missing"),
        ("state", {"file": "../state", "bytes": 1, "sha256": ""}, r"expected the state in state\.safetensors"),
        ("state", {"file": "state.safetensors", "bytes": "1", "sha256": ""}, "state.bytes: expected a whole number"),
        ("chain", [{"dim": 3}], r"chain\[0\]\.name: expected text, found None"),
        ("model", {"id": 3}, "model.id: expected text, found 3"),
        ("model", [], "model: expected an object"),
        ("complete", 1, "complete: expected true or false"),
        ("nonfinite", -1, "below zero"),
        ("extra", {"queries": [1]}, r"extra\.queries\[0\]: expected an object"),
        ("kind", [], "kind: expected text, found"),
        ("dtype", "float8", "expected a store dtype"),
        ("rows", 1000, "all 63 shards listed"),
        ("rows_per_shard", 0, "rows_per_shard >= 1"),
        ("rows", "many", "rows: expected a whole number, found 'many'"),
        ("rows", True, "rows: expected a whole number"),
    ],
)
def test_a_damaged_manifest_says_where(tmp_path: Path, key: str, value: object, found: str) -> None:
    run = write(tmp_path / "run")
    edit_manifest(run, **{key: value})
    for use in (open_store, verify, read_manifest, lambda path: create_store(path, manifest())):
        with pytest.raises(StoreError, match=found):
            use(run)


def flipped(content: bytes, step: int, most: int = 1 << 30) -> list[bytes]:
    """The content with one bit of one byte changed, of every ``step``-th byte."""
    return [
        content[:at] + bytes([content[at] ^ (1 << at % 8)]) + content[at + 1 :]
        for at in range(0, min(len(content), most), step)
    ]


def refusal(use: Callable[[], bool]) -> str:
    """What a use is refused with; nothing where it finds what was written."""
    try:
        assert use()
    except StoreError as error:
        return str(error)
    return ""


def test_no_altered_bit_of_a_manifest_goes_unnoticed(tmp_path: Path) -> None:
    run = write(tmp_path / "run")
    written, good = read_manifest(run), (run / "manifest.json").read_bytes()
    for content in flipped(good, 23):
        (run / "manifest.json").write_bytes(content)
        said = refusal(lambda: read_manifest(run) == written)
        assert not said or str(run / "manifest.json") in said


def test_no_altered_bit_of_the_examples_is_read(tmp_path: Path) -> None:
    run = write(tmp_path / "run")
    file = run / "examples/00001.arrow"
    for content in flipped(file.read_bytes(), 17):
        file.unlink()  # what is mapped stays as it was
        file.write_bytes(content)
        with pytest.raises(StoreError, match=r"examples/00001\.arrow is damaged"):
            _ = open_store(run).examples


@pytest.mark.parametrize("name", ["shards/00000.npy", "shards/00000.scale.npy"])
def test_a_damaged_header_is_named(tmp_path: Path, name: str) -> None:
    run = write(tmp_path / "run", dtype="int8")
    good = (run / name).read_bytes()
    expected = open_store(run).matrix()[:]
    for content in [*flipped(good, 1, 128), good[:60] + b"((((" + good[64:]]:
        (run / name).write_bytes(content)
        said = refusal(lambda: (open_store(run).matrix()[:] == expected).all())
        assert not said or f"{name} is damaged" in said


def test_a_state_is_compared_with_its_hash_when_it_is_used(tmp_path: Path) -> None:
    run = write(tmp_path / "run")
    file = run / "state.safetensors"
    good = file.read_bytes()
    for content in (*flipped(good, 11), good[:-1], b""):
        file.unlink()
        file.write_bytes(content)
        with pytest.raises(StoreError, match=r"state of .* is damaged: state\.safetensors: expected"):
            open_store(run).state()
    edit_manifest(run, state=None)  # of a release that did not keep the hash
    file.write_bytes(good[:3] + b"x" + good[4:])
    with pytest.raises(StoreError, match=r"state\.safetensors is damaged"):
        open_store(run).state()


def test_an_unfinished_run_is_not_continued_with_an_altered_state(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with create_store(run, manifest()) as writer:
        writer.save_state({"moments": torch.arange(5.0)})
        writer.put(0, rows(range(16)), examples(range(16)))
    good = (run / "state.safetensors").read_bytes()
    (run / "state.safetensors").write_bytes(good[:-2] + b"\x41" + good[-1:])
    with pytest.raises(StoreError, match=r"the fitted state of .* is damaged"):
        create_store(run, manifest())
    with pytest.warns(UserWarning, match="unfinished"), pytest.raises(StoreError, match="is damaged"):
        open_store(run).state()
    (run / "state.safetensors").unlink()  # fitted again
    with create_store(run, manifest()) as writer:
        assert writer.load_state() is None
        writer.save_state({"moments": torch.arange(5.0)})
        fill(writer)
    assert verify(run) == []
    assert torch.equal(open_store(run).state()["moments"], torch.arange(5.0))


def test_the_state_of_a_run_begun_by_an_earlier_release_gets_its_hash(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with create_store(run, manifest()) as writer:
        writer.save_state({"moments": torch.arange(5.0)})
    edit_manifest(run, state=None)
    with create_store(run, manifest()) as writer:
        assert writer.load_state() is not None
        assert read_manifest(run).state is not None
        fill(writer)
    assert verify(run) == []


def test_what_an_unfinished_pass_has_is_compared_with_its_hash(tmp_path: Path) -> None:
    save_parts(tmp_path, 0, {"sum": torch.ones(3, dtype=torch.float64), "none": torch.zeros(0)}, [1, 2])
    [(tensors, parts)] = load_parts(tmp_path)
    assert (tensors["sum"].tolist(), parts) == ([1.0, 1.0, 1.0], [1, 2])
    file = tmp_path / "progress-0.safetensors"
    good = file.read_bytes()
    for content in flipped(good, 7):
        file.unlink()
        file.write_bytes(content)
        said = refusal(lambda: [(f["sum"].tolist(), p) for f, p in load_parts(tmp_path)] == [([1.0] * 3, [1, 2])])
        assert not said or f"{file} is damaged" in said
    with create_store(tmp_path / "run", manifest()) as writer:
        writer.save_progress({"a": torch.ones(2)}, 1)
        loaded = writer.load_progress()
        assert loaded is not None
        assert loaded[1] == 1


def test_names_that_the_system_refuses_are_no_stores(tmp_path: Path) -> None:
    for name in (300 * "a", "a\0b"):
        with pytest.raises(StoreError, match="is not a store: it does not exist"):
            open_store(tmp_path / name)
    with pytest.raises(StoreError, match="File name too long"):
        create_store(tmp_path / (300 * "a"), manifest())

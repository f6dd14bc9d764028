import gzip
import socket

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from funcattrib.data import Columns, load, read
from funcattrib.data.documents import read_documents
from funcattrib.errors import DataError
from funcattrib.runtime import hub
from tests.support.waiting import OUTER_LIMIT

TEXTS = ["one", "two", "three"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(read, "_cache_folder", lambda: datasets.config.HF_DATASETS_CACHE)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    datasets.disable_progress_bars()
    (tmp_path / "a.csv").write_text("text,reward\none,1\ntwo,2\nthree,3\n")
    (tmp_path / "a.tsv").write_text("text\treward\none\t1\ntwo\t2\nthree\t3\n")
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "{text}"}}\n' for text in TEXTS))
    (tmp_path / "a.json").write_text('[{"text": "one"}, {"text": "two"}, {"text": "three"}]')
    (tmp_path / "a.txt").write_text("one\ntwo\nthree\n")
    (tmp_path / "b[1].txt").write_text("four\n")
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write((tmp_path / "a.jsonl").read_text())
    whole = datasets.Dataset.from_dict({"text": TEXTS})
    whole.to_parquet(str(tmp_path / "a.parquet"))
    batch = pa.record_batch({"text": pa.array(TEXTS)})
    for name, new in {"file.arrow": pa.ipc.new_file, "stream.arrow": pa.ipc.new_stream}.items():
        with pa.OSFile(str(tmp_path / name), "wb") as file, new(file, batch.schema) as writer:
            writer.write(batch)
    whole.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict(train=whole, test=whole.select([1])).save_to_disk(str(tmp_path / "splits"))
    datasets.DatasetDict(dev=whole, test=whole).save_to_disk(str(tmp_path / "no_train"))
    (tmp_path / "plain").mkdir()
    whole.to_parquet(str(tmp_path / "plain" / "train.parquet"))
    whole.select([1]).to_parquet(str(tmp_path / "plain" / "test.parquet"))
    datasets.enable_progress_bars()
    return tmp_path


@pytest.mark.parametrize(
    "source",
    [
        *("a.csv", "a.tsv", "a.jsonl", "a.json", "a.txt", "a.jsonl.gz", "a.parquet", "file.arrow", "stream.arrow"),
        *("saved", "splits", "plain", "./a.txt", "./sav*/../a.csv"),
    ],
)
def test_every_kind_gives_the_same_rows(folder, source):
    assert load(source)["text"][:] == TEXTS


def test_a_glob_reads_files_in_the_order_of_their_names(folder):
    assert load("*.txt")["text"][:] == [*TEXTS, "four"]
    assert load(folder / "b[1].txt")["text"][:] == ["four"]  # a name, though it could be a pattern


@pytest.mark.parametrize(
    ("source", "split", "expected"),
    [
        ("splits", "test", ["two"]),
        ("plain", "test", ["two"]),
        ("saved", "train[1:]", ["two", "three"]),
        ("a.csv", "train[:34%]", ["one"]),
        ("splits", "test+train[:1]", ["two", "one"]),
    ],
)
def test_splits_and_slices(folder, source, split, expected):
    assert load(source, split)["text"][:] == expected


def test_a_saved_slice_is_called_by_its_split(folder):
    load("splits", "train[:2]").save_to_disk("slice")
    assert load("slice", "train[1:]")["text"][:] == ["two"]


def _latin() -> pa.Array:
    """Two texts, of which the second is no UTF-8."""
    return pa.StringArray.from_buffers(2, pa.py_buffer(b"\0\0\0\0\1\0\0\0\5\0\0\0"), pa.py_buffer(b"acaf\xe9"))


def _arrow(texts: pa.Array) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, pa.schema({"text": pa.string()})) as writer:
        writer.write_table(pa.table({"text": texts}))
    return sink.getvalue().to_pybytes()


BAD_FILES = {
    "empty.csv": b"",
    "empty.jsonl": b"",
    "header.csv": b"text\n",
    "blank.jsonl": b"\n\n",
    "ragged.csv": b"text,x\na,b\nc,d,e\n",
    "broken.jsonl": b'{"text": "x"}\n{"text": nu\n',
    "broken.parquet": b"PAR1 nothing of the kind",
    "broken.arrow": b"nothing",
    "latin.txt": b"caf\xe9\n",
    "latin.csv": b"text\ncaf\xe9\n",
    "text.doc": b"text",
    "latin.json": b'[{"text": "a"},\n{"text": "caf\xe9"}]',
    "utf16.jsonl": '{"text": "a"}\n'.encode("utf-16"),
    "latin.arrow": _arrow(_latin()),
}


@pytest.mark.parametrize(
    ("source", "split", "says"),
    [
        ("empty.csv", None, "empty.csv is empty"),
        ("empty.jsonl", None, "empty.jsonl is empty"),
        ("header.csv", None, "header.csv has no rows"),
        ("blank.jsonl", None, "blank.jsonl has no rows"),
        ("ragged.csv", None, "line 3"),
        ("broken.jsonl", None, "JSON parse error"),
        ("broken.parquet", None, "Parquet"),
        ("broken.arrow", None, "arrow data"),
        ("latin.txt", None, "is no UTF-8 in line 1 (row 0): byte 0xe9 after 'caf'\nsave it as UTF-8"),
        ("latin.csv", None, "is no UTF-8 in line 2 (row 0): byte 0xe9 after 'caf'"),
        ("latin.json", None, 'is no UTF-8 in line 2: byte 0xe9 after \'{"text": "caf\''),
        ("utf16.jsonl", None, "is no UTF-8 in line 1 (row 0): byte 0xff"),
        ("latin.arrow", None, "Invalid UTF8 sequence at string index 1\nsave it as UTF-8"),
        ("text.doc", None, "text.doc"),
        ("[ae]*.[cj]s*", None, "are of several kinds (csv, json)"),
        ("a.[ct]sv", None, "are of several kinds (csv, tsv)"),
        ("*.zip", None, "no file matches"),
        ("missing.csv", None, "a.csv"),  # names what there is
        ("no/such/folder/a.csv", None, "no folder no/such/folder"),
        ("https://host/a.csv", None, "does not exist"),
        ("", None, "does not exist"),
        ("nothing", None, "data files"),
        ("no_train", None, "dev, test"),
        ("saved", "valid", "train"),
        ("splits", "valid", "train, test"),
        ("plain", "valid", "train, test"),
        ("a.csv", "test", "train"),
        ("splits", "train[:x]", "train, test"),
        ("splits", "train[:0]", "train[:0]"),
        ("splits", "train[2:1]", "train[2:1]"),
        ("a.csv", "train[3:]", "no rows in split 'train[3:]'"),
        ("a.csv", "train[100:200]", "no rows in split"),
        ("a.csv", "train[99%:]", "no rows in split"),
    ],
)
def test_what_cannot_be_read_is_said_in_two_lines(folder, source, split, says):
    for name, content in BAD_FILES.items():
        (folder / name).write_bytes(content)
    (folder / "nothing").mkdir()
    with pytest.raises(DataError) as raised:
        load(source, split)
    message = str(raised.value)
    assert says in message
    assert source in message.partition("\n")[0]
    assert message.count("\n") == 1, message


def test_loading_is_quiet(folder, capfd):
    bars = datasets.are_progress_bars_disabled()
    load("a.csv")
    with pytest.raises(DataError):
        load("missing.csv")
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""
    assert datasets.are_progress_bars_disabled() == bars


@pytest.fixture
def silent_hub(monkeypatch):
    """A hub that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        yield server


def test_an_unreachable_hub_is_asked_once(folder, silent_hub, monkeypatch):
    monkeypatch.setattr(read, "hub_reachable", lambda: hub.hub_reachable(0.3))
    with pytest.raises(DataError, match="the hub does not answer"):
        load("owner/name")
    silent_hub.settimeout(OUTER_LIMIT)
    silent_hub.accept()
    silent_hub.settimeout(0)
    with pytest.raises(BlockingIOError):  # asked once; the client's own retries take minutes
        silent_hub.accept()
    assert not datasets.config.HF_HUB_OFFLINE  # as it was


def test_offline_mode_is_said_at_once(folder, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"offline mode is on \(HF_HUB_OFFLINE\)\n"):
        load("owner/name")


def test_an_unreachable_hub_leaves_the_cached_copy(folder, silent_hub, monkeypatch):
    monkeypatch.setattr(read, "hub_reachable", lambda: False)
    cached = folder / "cache" / "owner___name" / "default" / "0.0.0" / "0123456789abcdef"
    cached.mkdir(parents=True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder / "cache"))
    saved = load("saved")
    features = '{"text": {"dtype": "string", "_type": "Value"}}'
    splits = '{"train": {"name": "train", "num_bytes": 1, "num_examples": 3, "dataset_name": "name"}}'
    (cached / "dataset_info.json").write_text(
        f'{{"builder_name": "parquet", "dataset_name": "name", "config_name": "default", "features": {features}, '
        f'"version": {{"version_str": "0.0.0", "major": 0, "minor": 0, "patch": 0}}, "splits": {splits}}}'
    )
    with (
        pa.OSFile(str(cached / "name-train.arrow"), "wb") as file,
        pa.ipc.new_stream(file, saved.data.table.schema) as writer,
    ):
        writer.write_table(saved.data.table)
    assert load("owner/name")["text"][:] == TEXTS


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        (
            "l.jsonl",
            b'{"text": "a"}\n{"text": "caf\xe9"}\n',
            r"l.jsonl is no UTF-8 in line 2 \(row 1\): byte 0xe9 after .*caf",
        ),
        ("l.jsonl.gz", gzip.compress(b'{"text": "caf\xe9"}\n', mtime=0), r"l.jsonl.gz is no UTF-8 in line 1 \(row 0\)"),
        ("l.parquet", pa.table({"text": _latin()}), r"no UTF-8 in column 'text' of row 1: byte 0xe9 at position 3"),
        (
            "l.parquet",
            pa.table({"text": pa.ListArray.from_arrays([0, 1, 2], _latin())}),
            "no UTF-8 in column 'text' of row 1: a text within it",
        ),
    ],
    ids=["jsonl", "gz", "parquet", "lists"],
)
def test_bytes_that_no_reader_checks_are_found_before_anything_is_tokenised(folder, name, content, says):
    if isinstance(content, pa.Table):
        pq.write_table(content, folder / name)
    else:
        (folder / name).write_bytes(content)
    with pytest.raises(DataError, match=says) as raised:
        read_documents(load(name), None, Columns(), max_length=9, truncation=True, vocab_size=None, name=name)
    assert str(raised.value).count("\n") == 1


BOM = b"\xef\xbb\xbf"


def test_a_byte_order_mark_is_no_text(folder):
    (folder / "sub").mkdir()
    for name in ("bom1.txt", "bom2.txt", "sub/a.txt"):
        (folder / name).write_bytes(BOM + b"one\r\ntwo\r\n")
    assert load("bom1.txt")["text"][:] == ["one", "two"]
    assert load("bom?.txt")["text"][:] == ["one", "two"] * 2
    assert load("sub")["text"][:] == ["one", "two"]


FILES = {
    "mixed objects and a byte order mark": [
        BOM + b'{"text": "a", "x": {"p": 1}}\n{"text": "b", "x": {"q": "r"}}\n',
        BOM + b'{"text": "a", "x": {"p": 1}}\n{"text": "b", "x": {"q": "r"}}\n',
    ],
    "nulls, then text": [b'{"text": "a", "x": null}\n', b'{"text": "b", "x": "y"}\n'],
    "a column more": [b'{"text": "a"}\n', b'{"text": "b", "x": [1]}\n'],
    "a column fewer": [b'{"text": "a", "x": 1}\n', b'{"text": "b"}\n'],
    "whole numbers, then fractions": [b'{"text": "a", "x": 1}\n', b'{"text": "b", "x": 1.5}\n'],
    "empty lists, then lists of text": [b'{"text": "a", "x": []}\n', b'{"text": "b", "x": ["y"]}\n'],
}


@pytest.mark.parametrize("name", list(FILES))
@pytest.mark.parametrize("source", ["many/*.jsonl", "many"])
def test_files_that_differ_are_joined(folder, name, source):
    (folder / "many").mkdir()
    for number, content in enumerate(FILES[name]):
        (folder / "many" / f"{number}.jsonl").write_bytes(content)
    texts = [load(folder / "many" / f"{number}.jsonl")["text"][:] for number in (0, 1)]
    joined = load(source)
    assert joined["text"][:] == texts[0] + texts[1]
    assert "x" in joined.column_names


def test_a_column_of_two_types_is_named(folder):
    (folder / "c1.jsonl").write_text('{"text": "a", "n": 1}\n')
    (folder / "c2.jsonl").write_text('{"text": "b", "n": "x"}\n')
    with pytest.raises(DataError, match=r"the column 'n' is int64 in .*c1\.jsonl and string in .*c2\.jsonl\n"):
        load("c?.jsonl")


def test_a_subset_is_of_the_hub(folder):
    with pytest.raises(DataError, match="`subset` is of data sets on the hub"):
        load("a.csv", subset="x")


def test_no_altered_bit_of_an_arrow_file_ends_the_process(tmp_path):
    """Offsets and UTF-8 are checked before a row is read; what cannot be known to be damaged is read."""
    texts = [f"the {n}th document é" for n in range(20)]
    whole = datasets.Dataset.from_dict({"text": texts})
    whole.save_to_disk(tmp_path / "saved")
    file = tmp_path / "saved/data-00000-of-00001.arrow"
    good, refused = file.read_bytes(), 0
    for at in range(0, len(good), 13):
        file.unlink()  # what is mapped stays as it was
        file.write_bytes(good[:at] + bytes([good[at] ^ 0x90]) + good[at + 1 :])
        try:
            assert len(list(load(tmp_path / "saved"))) <= 20
        except DataError as error:
            refused += "damaged" in str(error) or "cannot be read" in str(error)
    assert refused > len(good) // 13 // 4
    (tmp_path / "alone.arrow").write_bytes(good)
    assert load(tmp_path / "alone.arrow")["text"][:] == texts
    offsets = good.find(b"\0\0\0\0" + len(texts[0].encode()).to_bytes(4, "little"))
    (tmp_path / "alone.arrow").write_bytes(good[: offsets + 6] + b"\x7f" + good[offsets + 7 :])
    with pytest.raises(DataError, match=r"alone\.arrow is damaged"):
        load(tmp_path / "alone.arrow")

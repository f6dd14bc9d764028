"""A data set from wherever it is: a hub id, a saved folder, files or a glob of them."""

import atexit
import functools
import glob
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import datasets
import pyarrow as pa

from funcattrib.data.arrow_files import check_files, check_saved
from funcattrib.data.utf8 import bad_bytes
from funcattrib.errors import DataError
from funcattrib.runtime.hub import hub_reachable, offline, quiet, reason

log = logging.getLogger(__name__)

_KINDS = {
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".txt": "text",
}
_COMPRESSED = {".gz", ".bz2", ".xz", ".zst"}
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_FORMS = "a hub id, a folder, or a csv, tsv, json, jsonl, parquet, arrow or txt file or glob"


def load(source: str | Path, split: str | None = None, *, subset: str | None = None) -> datasets.Dataset:
    r"""Open a data set, memory-mapped.

    Args:
        source: a hub id, a `save_to_disk` folder, another folder of data files, or a csv, tsv, json, jsonl, parquet,
            arrow or txt file (also compressed) or a glob of those, read in the order of their names. A txt file gives
            one row a line.
        split: as `datasets` writes it, slices (`train[:1%]`) included. By default the only one, or `train`.
        subset: the configuration of a hub data set that has several.

    Raises:
        DataError: where there is no such thing, it cannot be read, or is empty.

    Example:
        >>> import tempfile
        >>> with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        ...     _ = file.write("one document\nand another")
        ...     file.flush()
        ...     load(file.name)["text"][:]
        ['one document', 'and another']
    """
    source = os.path.expanduser(os.fspath(source))
    if subset is not None and os.path.exists(source):
        raise DataError(f"`subset` is of data sets on the hub, and {source} is here\nleave `subset` out")
    with quiet():
        found = _open(source, split, subset)
        dataset = choose_split(found, split, source)
        if _is_saved(source):
            check_saved(dataset, source)
    if not len(dataset):
        part = "" if split is None else f" in split '{split}'"
        raise DataError(f"{source} has no rows{part}\nchoose another split or file")
    return dataset


def files_of(source: str | Path) -> list[str]:
    """Return the files that a name stands for; none for a hub id."""
    source = os.path.expanduser(os.fspath(source))
    if os.path.isdir(source):
        return sorted(str(path) for path in Path(source).rglob("*") if path.is_file())
    return [source] if os.path.isfile(source) else sorted(filter(os.path.isfile, glob.glob(source, recursive=True)))


def _open(source: str, split: str | None, subset: str | None) -> Mapping[str, datasets.Dataset]:
    if os.path.isdir(source):
        return _open_folder(source, split)
    if os.path.isfile(source):
        return _open_files([source], source, split)
    if glob.has_magic(source):
        files = sorted(path for path in glob.glob(source, recursive=True) if os.path.isfile(path))
        if not files:
            raise DataError(f"no file matches {source}\ncheck the pattern, and quote it in a shell")
        return _open_files(files, source, split)
    if _HUB_ID.fullmatch(source) and not source.startswith(".") and _kind(source) is None:
        return _open_hub(source, split, subset)
    raise DataError(f"'{source}' does not exist; give {_FORMS}\n{_neighbours(source)}")


def _is_saved(folder: str) -> bool:
    """Return whether ``save_to_disk`` wrote a folder."""
    return any(os.path.isfile(os.path.join(folder, name)) for name in ("dataset_dict.json", "state.json"))


def _open_folder(folder: str, split: str | None) -> Mapping[str, datasets.Dataset]:
    if _is_saved(folder):
        try:
            found = datasets.load_from_disk(folder)
        except Exception as error:
            raise _unreadable(folder, "a folder written by save_to_disk", error) from error
        return found if isinstance(found, datasets.DatasetDict) else {_split_name(found): found}
    return _build(
        folder, None, split, what="a folder of data files (csv, json, parquet, arrow, txt) or of save_to_disk"
    )


def _open_files(files: list[str], source: str, split: str | None) -> Mapping[str, datasets.Dataset]:
    kinds = {path: _kind(path) for path in files}
    unknown = [path for path, kind in kinds.items() if kind is None]
    if unknown:
        raise DataError(
            f"expected a csv, tsv, json, jsonl, parquet, arrow or txt file, found {unknown[0]}\n"
            "convert it to one of these"
        )
    if len(set(kinds.values())) > 1:
        names = ", ".join(sorted(str(kind) for kind in set(kinds.values())))
        raise DataError(f"the files of {source} are of several kinds ({names})\nnarrow the pattern")
    if not any(map(os.path.getsize, files)):
        raise DataError(f"{source} is empty\nchoose another file")
    kind = str(kinds[files[0]])
    suffixes = {
        Path(path.removesuffix(Path(path).suffix) if Path(path).suffix in _COMPRESSED else path).suffix
        for path in files
    }
    if ".tsv" in suffixes and len(suffixes) > 1:
        raise DataError(f"the files of {source} are of several kinds (csv, tsv)\nnarrow the pattern")
    options = {"sep": "\t"} if ".tsv" in suffixes else {}
    if kind == "text":
        options["encoding"] = "utf-8-sig"  # a byte order mark is no text
    if kind == "arrow":
        check_files(path for path in files if os.path.getsize(path))
    # An empty file among others has no header, and no rows either: left out, where readers would stumble.
    full = [glob.escape(os.path.abspath(path)) for path in files if os.path.getsize(path)]
    return _build(kind, full, split, what=f"{kind} data", source=source, **options)


def _open_hub(name: str, split: str | None, subset: str | None) -> Mapping[str, datasets.Dataset]:
    what = f"the data set '{name}' on the hub" + (f" with subset '{subset}'" if subset else "")
    if hub_reachable():
        return _build(name, None, split, what=what, subset=subset)
    with offline():
        try:
            found = _build(name, None, split, what=what, subset=subset)
        except DataError as error:
            why = "offline mode is on (HF_HUB_OFFLINE)" if _asked_offline() else "the hub does not answer"
            raise DataError(
                f"'{name}' is no file or folder, no copy of such a data set is in the cache, and {why}\n"
                "check the spelling and the connection, or copy the data here and name its path"
            ) from error
    log.warning("the hub does not answer; using the cached copy of %s", name)
    return found


def _build(
    path: str,
    files: list[str] | None,
    split: str | None,
    *,
    what: str,
    source: str | None = None,
    subset: str | None = None,
    **options: str,
) -> Mapping[str, datasets.Dataset]:
    """Read with `datasets`, and put what goes wrong into words."""
    builder = None
    try:
        builder = datasets.load_dataset_builder(path, subset, data_files=files, cache_dir=_cache_folder(), **options)
        if builder.name == "text" and "encoding" not in options and builder.config.data_files:  # a folder of them
            parts = {name: list(each) for name, each in builder.config.data_files.items()}
            builder = datasets.load_dataset_builder(
                "text", data_files=parts, cache_dir=_cache_folder(), encoding="utf-8-sig"
            )
        known = builder.info.splits
        if split is not None and known:  # known before a download only where the hub says so
            _instructions(split, dict.fromkeys(known, 1 << 40), source or path)
        builder.download_and_prepare()
        sizes = {name: info.num_examples for name, info in (builder.info.splits or {}).items()}
        # `datasets` refuses to open a split without rows; here that is one without rows.
        return {
            name: builder.as_dataset(name) if rows else datasets.Dataset.from_dict({}) for name, rows in sizes.items()
        }
    except DataError:
        raise
    except Exception as error:
        if files is not None and len(files) > 1:
            return {"train": _one_by_one(path, files, what, options)}
        if os.path.isdir(path) and builder is not None and builder.config.data_files:
            parts = {name: [glob.escape(file) for file in each] for name, each in builder.config.data_files.items()}
            return {name: _one_by_one(builder.name, each, what, options) for name, each in parts.items()}
        file = glob.glob(files[0])[0] if files else path  # escaped, so it matches itself
        raise bad_bytes([file] if files else []) or _unreadable(source or file, what, error) from error


def _one_by_one(kind: str, files: list[str], what: str, options: Mapping[str, str]) -> datasets.Dataset:
    """Read files that cannot be read together."""
    return _joined({file: _build(kind, [file], None, what=what, **options) for file in files})


def _joined(found: Mapping[str, Mapping[str, datasets.Dataset]]) -> datasets.Dataset:
    """Join files that differ: a column that a file lacks is null there, and of two types of numbers the wider is taken.

    Raises:
        DataError: a column is of two types.
    """
    tables = {glob.glob(name)[0]: next(iter(splits.values())).data.table for name, splits in found.items()}
    known: dict[str, tuple[str, pa.Field]] = {}
    for file, table in tables.items():
        for field in table.schema.remove_metadata():
            first, before = known.get(field.name, (file, field))
            try:
                schemas = [pa.schema([before]), pa.schema([field])]
                known[field.name] = first, pa.unify_schemas(schemas, promote_options="permissive").field(0)
            except pa.ArrowException as error:
                raise DataError(
                    f"the column '{field.name}' is {before.type} in {first} and {field.type} in {file}\n"
                    "convert it in one of them, or drop it"
                ) from error
    bare = [table.replace_schema_metadata() for table in tables.values()]
    joined = pa.concat_tables(bare, promote_options="permissive")
    return datasets.Dataset(datasets.table.InMemoryTable(joined))


def choose_split(found: Mapping[str, datasets.Dataset], split: str | None, source: str) -> datasets.Dataset:
    """Return the split that is asked for, or parts of several; by default the only one, or ``train``.

    Raises:
        DataError: there is none, or several and none is asked for.
    """
    if not found:
        raise DataError(f"{source} has no splits\nchoose another data set")
    if split is None:
        if len(found) > 1 and "train" not in found:
            raise DataError(f"{source} has the splits {', '.join(found)}, and no train\nchoose one with `split`")
        split = "train" if "train" in found else next(iter(found))
    lengths = {name: len(dataset) for name, dataset in found.items()}
    parts = []
    for part in _instructions(split, lengths, source):
        whole = found[part.splitname]
        inside = range(len(whole))[slice(part.from_, part.to)]
        parts.append(whole if len(inside) == len(whole) else whole.select(inside if inside else range(0)))
    return parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)


def _instructions(
    split: str, lengths: Mapping[str, int], source: str
) -> list[datasets.arrow_reader._AbsoluteInstruction]:
    try:
        return list(datasets.ReadInstruction.from_spec(split).to_absolute(dict(lengths)))
    except (ValueError, AssertionError) as error:
        wrong = "" if "Unknown split" in str(error) else f" ({reason(error)})"
        raise DataError(
            f"{source} has no split '{split}'{wrong}; its splits are {', '.join(lengths)}\n"
            "name one of these with `split`; a part of one is written train[:1%] or train[100:200]"
        ) from error


def _unreadable(source: str, what: str, error: BaseException) -> DataError:
    why = reason(error).rpartition("on the Hugging Face Hub either: ")[2]
    if "hub" in what:
        return DataError(
            f"{what} cannot be read: {why}\ncheck the spelling; a private or gated one needs `hf auth login`"
        )
    decoding = "codec can't decode" in why or "Invalid UTF8" in why
    cure = "save it as UTF-8" if decoding else "check that it is whole and what its name says"
    return DataError(f"{source} cannot be read as {what}: {why}\n{cure}")


def _kind(path: str) -> str | None:
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    if suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
    return _KINDS.get(suffixes[-1]) if suffixes else None


def _neighbours(source: str) -> str:
    folder = os.path.dirname(source) or "."
    if not os.path.isdir(folder):
        return f"there is no folder {folder} either; check the path"
    names = sorted(name for name in os.listdir(folder) if _kind(name))[:5]
    return f"in {folder} there is: {', '.join(names)}" if names else f"no data file is in {folder}; check the path"


def _split_name(dataset: datasets.Dataset) -> str:
    # A saved slice is called train[:10] and is asked for as train.
    return re.sub(r"\W.*", "", str(dataset.split or "")) or "train"


def _asked_offline() -> bool:
    return any(os.environ.get(name) for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"))


@functools.cache
def _cache_folder() -> str | None:
    """Return None for the default of `datasets`; a temporary folder where that cannot be written to."""
    try:
        os.makedirs(datasets.config.HF_DATASETS_CACHE, exist_ok=True)
        with tempfile.TemporaryFile(dir=datasets.config.HF_DATASETS_CACHE):
            return None
    except OSError:
        folder = tempfile.mkdtemp(prefix="funcattrib-datasets-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        return folder

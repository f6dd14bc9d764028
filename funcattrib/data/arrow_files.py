"""Arrow files that others wrote, checked in full before anything reads them: a damaged offset would lead anywhere."""

from collections.abc import Iterable

import datasets
import pyarrow as pa

from funcattrib.errors import DataError


def check_files(files: Iterable[str]) -> None:
    """Check Arrow files, offsets and UTF-8 included.

    Raises:
        DataError: naming the first that is damaged.
    """
    for file in files:
        try:
            _read(file).validate(full=True)
        except (pa.ArrowException, OSError, ValueError) as error:
            why = " ".join(str(error).split())
            cure = "save it as UTF-8" if "Invalid UTF8" in why else "restore it, or save it again"
            raise DataError(f"{file} is damaged and cannot be read as arrow data: {why}\n{cure}") from error


def check_saved(dataset: datasets.Dataset, folder: str) -> None:
    """Check the rows of a data set that ``save_to_disk`` wrote to ``folder``.

    Raises:
        DataError: naming the file that is damaged.
    """
    try:
        dataset.data.table.validate(full=True)
    except (pa.ArrowException, ValueError) as error:
        check_files(each["filename"] for each in dataset.cache_files)
        raise DataError(f"{folder} is damaged: {' '.join(str(error).split())}\nsave it again") from error


def _read(file: str) -> pa.Table:
    """Map a file of either of Arrow's formats."""
    with pa.memory_map(file) as mapped:
        try:
            return pa.ipc.open_stream(mapped).read_all()
        except pa.ArrowInvalid:
            return pa.ipc.open_file(mapped).read_all()

"""Results of parts of a pass, a file a process: merged by whoever goes on, and no part counted twice."""

from pathlib import Path

import torch

from funcattrib.store import progress_files


def test_every_process_leaves_its_own(tmp_path: Path) -> None:
    for rank, parts in ((0, [0, 3]), (1, [1]), (10, [2, 4])):
        progress_files.save_parts(tmp_path, rank, {"sum": torch.tensor(float(rank))}, parts)
    progress_files.save_parts(tmp_path, 1, {"sum": torch.tensor(7.0)}, [1, 5])  # in the place of what it had
    found = progress_files.load_parts(tmp_path)
    assert [(float(tensors["sum"]), parts) for tensors, parts in found] == [(0, [0, 3]), (7, [1, 5]), (10, [2, 4])]


def test_killed_while_merging(tmp_path: Path, monkeypatch) -> None:
    for rank, parts in ((0, [0]), (1, [1]), (2, [2])):
        progress_files.save_parts(tmp_path, rank, {"sum": torch.ones(1)}, parts)
    with monkeypatch.context() as killed:
        killed.setattr(Path, "unlink", lambda *_, **__: None)  # the merged file is there, and all of the others
        progress_files.replace_parts(tmp_path, {"sum": torch.full((1,), 3.0)}, [0, 1, 2])
    assert len(list(tmp_path.glob(progress_files.FILES))) == 3
    [(tensors, parts)] = progress_files.load_parts(tmp_path)
    assert (float(tensors["sum"]), parts) == (3.0, [0, 1, 2])
    progress_files.replace_parts(tmp_path, tensors, parts)
    assert [file.name for file in tmp_path.iterdir()] == ["progress-0.safetensors"]

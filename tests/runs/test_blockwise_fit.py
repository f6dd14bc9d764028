"""Stages whose state is in parts: what each process holds, and that the parts make the whole."""

import tempfile
from pathlib import Path

import pytest
import torch

import funcattrib as fa
from funcattrib import testing as laws
from funcattrib.chain import state_tree
from funcattrib.errors import StoreError
from funcattrib.runs import blockwise_fit
from funcattrib.runs.blockwise_fit import PartialStates, StagePart
from funcattrib.store.spill import Scratch

GROUPS = {
    "parameter": "parameter",
    "all": "all",
    "some": {"layers": "layer.*"},
    "one by its name": {"matrix": ["matrix"]},
    "one by another": {"first": ["matrix"]},
}
DATA = [laws.grads(rows, seed=rows) for rows in (5, 1, 8)]


def taken_apart(stage: fa.Transform) -> dict[str, StagePart]:
    assert stage.parts is not None
    return {
        name: StagePart(own, {leaf: laws.MATRICES[leaf] for leaf in leaves})
        for name, (own, leaves) in stage.parts(laws.MATRICES).items()
    }


@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize("power", [-1, -0.5])
def test_parts_fitted_alone_make_the_whole(groups, power) -> None:
    stage = fa.precondition(power, groups, damping=0.3, damping_kind="absolute")
    whole = state_tree.flatten(laws.fitted(stage, DATA))
    parts = taken_apart(stage)
    assert sorted(leaf for part in parts.values() for leaf in part.spec) == sorted(laws.MATRICES)
    together: dict[str, torch.Tensor] = {}
    for part in parts.values():
        some = [{leaf: rows[leaf] for leaf in part.spec} for rows in DATA]
        together |= state_tree.flatten(laws.fitted(part.stage, some, part.spec))
    assert together.keys() == whole.keys()
    assert all(torch.equal(together[name], tensor) for name, tensor in whole.items())


@pytest.mark.parametrize("most", [1 << 30, 1])
def test_rows_that_waited_on_the_disk_give_the_same_state(most, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(blockwise_fit, "_MOST", most)
    monkeypatch.setattr(blockwise_fit, "_bytes", lambda state: 0)  # else so few rows would never be too many
    stage = fa.precondition(groups=GROUPS["some"])
    with PartialStates(tmp_path, taken_apart(stage)) as states:
        for rows in DATA:
            states.observe(rows)
        found = {name: states.of(name) for name in taken_apart(stage)}
    assert not [*tmp_path.iterdir()]
    whole = stage.init(laws.MATRICES)[0]
    for rows in DATA:
        whole = stage.observe(whole, rows)
    for name, state in found.items():
        torch.testing.assert_close(state.gram[name], whole.gram[name], rtol=1e-12, atol=1e-12)
        assert state.seen == whole.seen == 14


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64])
def test_a_tensor_comes_back_from_the_disk_to_the_bit(dtype, tmp_path) -> None:
    values = [torch.randn(3, 5).mul(100).to(dtype), torch.zeros(0, 4, dtype=dtype), torch.ones((), dtype=dtype)]
    with Scratch(tmp_path) as scratch:
        places = [scratch.put(value.T if value.ndim else value) for value in values]
        scratch.replace(places[0], 2 * values[0].T)
        assert scratch.bytes == 16 * values[0].element_size()
        for place, value in zip(places, [2 * values[0].T, values[1].T, values[2]], strict=True):
            assert torch.equal(scratch.get(place), value)
        scratch.clear()
        assert scratch.bytes == 0
        assert torch.equal(scratch.get(scratch.put(values[0])), values[0])


def test_a_folder_that_is_not_there_has_no_scratch() -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.raises(StoreError, match="No such file"):
        Scratch(Path(folder) / "none")


def test_a_preconditioner_takes_no_memory_before_it_is_fitted() -> None:
    state = fa.precondition().init({"w": fa.Leaf((30_000,), torch.float32)})[0]
    assert state.gram["w"].shape == state.power["w"].shape == (30_000, 30_000)
    assert state.gram["w"].untyped_storage().nbytes() == 8

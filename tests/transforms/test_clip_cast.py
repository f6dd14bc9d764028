"""Clipping to a length, and the grid of 255 levels."""

from pathlib import Path

import numpy as np
import pytest
import torch

import funcattrib as fa
from funcattrib import testing as laws
from funcattrib.errors import ChainError
from funcattrib.store import decode, encode
from funcattrib.transforms import clip
from funcattrib.transforms.registry import rebuild
from tests.support import cases, tiny


def flat(grads: fa.Grads) -> torch.Tensor:
    return torch.cat([value.flatten(1) for value in grads.values()], 1)


def test_clipped_rows_have_the_length_and_the_others_stay() -> None:
    values = laws.grads(8, laws.VECTORS)
    values = {n: v * torch.logspace(-2, 2, 8).view(-1, *[1] * (v.ndim - 1)) for n, v in values.items()}
    given, found = flat(values).double(), flat(clip(5.0)(None, values)).double()
    lengths = given.norm(dim=1)
    expected = torch.where((lengths > 5)[:, None], given * 5 / lengths[:, None], given)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert 0 < int((lengths > 5).sum()) < 8
    assert torch.equal(found[lengths <= 5], given[lengths <= 5])


def test_clip_takes_zeros_and_lengths_that_float32_cannot_square() -> None:
    found = clip(1.0)(None, {"w": torch.tensor([[0.0, 0.0], [3e30, 4e30]])})["w"]
    torch.testing.assert_close(found, torch.tensor([[0.0, 0.0], [0.6, 0.8]]))


@pytest.mark.parametrize("length", [0, -1.0, float("inf"), float("nan")])
def test_lengths_that_are_none(length) -> None:
    with pytest.raises(ChainError, match="expected a positive, finite max_norm"):
        clip(length)


@pytest.mark.parametrize("stage", [clip(2.5), fa.cast("int8")], ids=lambda stage: stage.name)
def test_description_makes_it_again(stage) -> None:
    chain = fa.compose(fa.per_example_grad, stage)
    again = rebuild(fa.per_example_grad, chain.describe())
    assert again.describe() == chain.describe()
    laws.same(again.apply((None,), laws.grads(3)), chain.apply((None,), laws.grads(3)))


def test_int8_is_the_grid_of_the_store() -> None:
    values = {n: v * torch.logspace(-3, 3, 9).view(-1, 1, 1) for n, v in laws.grads(9).items()}
    found = flat(fa.cast("int8")(None, values))
    stored = encode(flat(values), "int8")
    assert found.dtype == torch.float32
    assert torch.equal(found, decode(stored.array, "int8", stored.scale))
    assert (encode(found, "int8").array == stored.array).all()  # stored as they are
    for row, given in zip(found, flat(values), strict=True):
        levels = row.unique()
        assert len(levels) <= 255
        assert float((row - given).abs().max()) <= float(given.abs().max()) / 254 * (1 + 1e-5)


def test_int8_rows_of_zeros_and_of_nan() -> None:
    rows = {
        "a": torch.tensor([[0.0], [1.0], [torch.inf], [1e-45]]),
        "b": torch.tensor([[0.0], [torch.nan], [1.0], [0.0]]),
    }
    found = flat(fa.cast("int8")(None, rows))
    assert found[0].tolist() == found[3].tolist() == [0.0, 0.0]
    assert torch.isnan(found[1:3]).all()


def test_scores_of_int8_stores_are_those_of_float32(tmp_path: Path) -> None:
    settings = {"tokenizer": tiny.make_tokenizer(), "projection_dim": 4, "quiet": True}
    model = cases.causal("gpt_neox")
    texts = [{"text": text} for text in tiny.texts(60)]
    exact, bytes_ = (
        fa.collect_gradients(model, texts, path=tmp_path / dtype, dtype=dtype, **settings)
        for dtype in ("float32", "int8")
    )
    rows, stored = exact.matrix().tensor().numpy(), bytes_.matrix().tensor().numpy()
    queries = rows[:10]
    on_grid = fa.cast("int8")(None, {"row": torch.from_numpy(rows)})["row"].numpy()
    np.testing.assert_allclose(on_grid, stored, rtol=1e-6, atol=1e-6 * np.abs(rows).max())
    for query in queries:
        others = ~(rows == query).all(1)  # a document's score with itself would decide the correlation alone
        assert np.corrcoef(rows[others] @ query, stored[others] @ query)[0, 1] > 0.995

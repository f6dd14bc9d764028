"""Rows in the store's dtypes, and back."""

import math

import numpy as np
import pytest
import torch

from funcattrib.store import decode, encode

INF, NAN = math.inf, math.nan
WIDE = torch.randn(33, 17, generator=torch.Generator().manual_seed(0)) * torch.logspace(-4, 4, 33)[:, None]


@pytest.mark.parametrize(
    ("dtype", "relative"), [("float32", 0.0), ("float16", 2**-11), ("bfloat16", 2**-8), ("int8", None)]
)
def test_there_and_back(dtype: str, relative: float | None) -> None:
    array, scale, clipped, nonfinite = encode(WIDE, dtype)
    back = decode(array, dtype, scale)
    assert (clipped, nonfinite) == (0, 0)
    assert back.dtype == torch.float32
    step = WIDE.abs().amax(1, keepdim=True) / 254 if relative is None else WIDE.abs() * relative + 2**-25
    assert ((back - WIDE).abs() <= step * (1 + 1e-5)).all()
    again = encode(back, dtype)
    assert (again.array == array).all()  # what was stored once is stored as it is


def test_the_dtypes_of_the_files() -> None:
    found = {dtype: encode(WIDE, dtype) for dtype in ("float32", "float16", "bfloat16", "int8")}
    assert [str(encoded.array.dtype) for encoded in found.values()] == ["float32", "float16", "uint16", "int8"]
    assert found["int8"].scale is not None
    assert found["int8"].scale.dtype == np.float32
    assert found["int8"].scale.shape == (33,)
    assert all(found[dtype].scale is None for dtype in ("float32", "float16", "bfloat16"))


def test_float16_saturates_and_counts() -> None:
    x = torch.tensor([[65504.0, 65519.0, 65520.0, 1e30], [-65504.0, -65505.0, INF, NAN]])
    encoded = encode(x, "float16")
    assert encoded.array[0].tolist() == [65504.0] * 4
    assert encoded.array[1, :3].tolist() == [-65504.0, -65504.0, INF]
    assert np.isnan(encoded.array[1, 3])
    assert (encoded.clipped, encoded.nonfinite) == (4, 2)


def test_bfloat16_saturates_and_counts() -> None:
    largest = torch.finfo(torch.bfloat16).max
    x = torch.tensor([[largest, torch.finfo(torch.float32).max, -torch.finfo(torch.float32).max, INF, -INF, NAN]])
    encoded = encode(x, "bfloat16")
    assert decode(encoded.array, "bfloat16")[0, :5].tolist() == [largest, largest, -largest, INF, -INF]
    assert (encoded.clipped, encoded.nonfinite) == (2, 3)


def test_float32_keeps_every_bit() -> None:
    x = torch.tensor([[1e-45, -0.0, 3.4e38, INF, NAN]])
    encoded = encode(x, "float32")
    assert encoded.array.tobytes() == x.numpy().tobytes()
    assert (encoded.clipped, encoded.nonfinite) == (0, 2)


def test_int8_rows_stand_alone() -> None:
    x = torch.tensor([[0.0, 0.0], [1e-45, 0.0], [3.4e38, -1.7e38], [NAN, 1.0], [INF, 1.0], [2.0, -1.0]])
    array, scale, clipped, nonfinite = encode(x, "int8")
    back = decode(array, "int8", scale)
    assert back[0].tolist() == [0, 0]
    assert back[1].tolist() == [0, 0]
    assert back[2, 0].item() == pytest.approx(3.4e38, rel=1e-6)
    assert torch.isnan(back[3:5]).all()
    assert array[5].tolist() == [127, -64]
    assert (clipped, nonfinite) == (0, 2)


@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16", "int8"])
def test_a_row_does_not_depend_on_its_neighbours(dtype: str) -> None:
    whole = encode(WIDE, dtype)
    for row in range(len(WIDE)):
        alone = encode(WIDE[row : row + 1], dtype)
        assert (alone.array == whole.array[row]).all()
        assert alone.scale is None or whole.scale is None or alone.scale[0] == whole.scale[row]


@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16", "int8"])
def test_no_rows(dtype: str) -> None:
    encoded = encode(torch.zeros(0, 4), dtype)
    assert decode(encoded.array, dtype, encoded.scale).shape == (0, 4)


def test_the_input_is_left_as_it_is_and_so_is_the_stored() -> None:
    x = torch.tensor([[1e9, 1.0]])
    encoded = encode(x, "float16")
    assert x.tolist() == [[1e9, 1.0]]
    decode(encoded.array, "float16").zero_()
    assert encoded.array[0, 1] == 1
    encoded = encode(torch.ones(1, 2), "float32")
    decode(encoded.array, "float32").zero_()
    assert encoded.array[0, 1] == 1

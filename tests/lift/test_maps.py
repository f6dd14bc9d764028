"""A map divided into the sides that come first and the map after them is the map."""

import pytest
import torch

from funcattrib.chain.transform import Transform
from funcattrib.errors import ChainError
from funcattrib.lift import InnerProducts, Measured, Scale, TwoSided, readout
from funcattrib.testing import check_transform

G = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
LEFT, RIGHT = torch.arange(6.0, dtype=torch.float64).reshape(2, 3), torch.arange(5.0, dtype=torch.float64)
PAIR = TwoSided(LEFT, RIGHT)
SMALL, WHOLE = Scale(torch.full((2, 5), 3.0)), Scale(torch.full((3, 5), 3.0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_scale_by_a_number(dtype: torch.dtype) -> None:
    tenth = Scale(0.1)
    assert tenth.to(dtype) == tenth
    assert torch.equal(tenth.from_gradient(G.to(dtype)), G.to(dtype) * 0.1)
    assert torch.equal(tenth.adjoint(G[0].to(dtype)), G[0].to(dtype) * 0.1)
    with pytest.raises(ChainError, match="a tensor or a number as the factor of Scale, found str"):
        Scale("0.1")
    check_transform(Transform("tenth", maps=lambda state, spec: {name: readout(name, Scale(0.1)) for name in spec}))


def squares(gradient: torch.Tensor) -> torch.Tensor:
    return gradient.square().sum(2)


@pytest.mark.parametrize(
    ("gradient_map", "sides", "remaining"),
    [
        (TwoSided(), 0, False),
        (PAIR, 2, False),
        (TwoSided(right=RIGHT), 1, False),
        (WHOLE, 0, True),
        (SMALL @ PAIR, 2, True),
        (InnerProducts(torch.ones(2, 2, 5), norm=True) @ (SMALL @ PAIR), 2, True),
        (PAIR @ WHOLE, 0, True),
        (Measured(TwoSided(), squares), 0, True),
        (Measured(TwoSided(), squares) @ PAIR, 2, True),
        (Measured(TwoSided(), squares) @ (SMALL @ PAIR), 2, True),
    ],
)
def test_sides_first(gradient_map, sides, remaining) -> None:
    left, right, rest = gradient_map.sides_first()
    assert sum(side is not None for side in (left, right)) == sides
    assert (rest is not None) == remaining
    coordinates = TwoSided(left, right).from_gradient(G)
    assert torch.equal(coordinates if rest is None else rest.from_gradient(coordinates), gradient_map.from_gradient(G))

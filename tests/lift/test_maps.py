"""A map divided into the sides that come first and the map after them is the map."""

import pytest
import torch

from funcattrib.lift import InnerProducts, Measured, Scale, TwoSided

G = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
LEFT, RIGHT = torch.arange(6.0, dtype=torch.float64).reshape(2, 3), torch.arange(5.0, dtype=torch.float64)
PAIR = TwoSided(LEFT, RIGHT)
SMALL, WHOLE = Scale(torch.full((2, 5), 3.0)), Scale(torch.full((3, 5), 3.0))


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

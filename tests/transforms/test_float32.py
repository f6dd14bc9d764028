"""Float32: as near to float64 as the condition of what is computed allows.

A linear transform y = M x computed in float32 is off by at most

    |ŷ - M x|  ≤  n u |M| |x|        u = 2⁻²⁴, n roundings on the way to one number

entry by entry, in any order of summation and on any processor; where nothing cancels, |M| |x| is |y| itself.
Reference: Higham, Accuracy and Stability of Numerical Algorithms, 2002, sections 3.1 and 3.5.
"""

import math

import pytest
import torch
from torch import Tensor

import funcattrib as fa
from funcattrib import testing as laws
from funcattrib.chain.transform import Transform
from tests.support import cases

UNIT = 2.0**-24
ROWS = 4
# A number is a sum over no more than the coordinates of all leaves; casts, roots and scales add a few roundings.
ROUNDINGS = sum(math.prod(leaf.shape) for leaf in laws.KERNELS.values()) + 16

LINEAR = [
    "project",
    "project_normal",
    "adafactor_norm",
    "adam_norm",
    "split_heads",
    "sketch",
    "sketch_sparse",
    "split_experts",
    "select",
    "precondition",
    "precondition_inverse",
    "precondition_pseudo",
    "precondition_all",
    "precondition_groups",
    "inner_products",
    "inner_products_by_leaf",
]
POSITIVE = ["unit_norm", "clip", "self_influence"]
"""Sums of squares and products: nothing cancels."""


def narrow(values: fa.Grads) -> fa.Grads:
    return {name: value.float() for name, value in values.items()}


def both(transform: Transform, spec: fa.Spec = laws.KERNELS) -> tuple[fa.Grads, fa.Grads, fa.Grads]:
    """What comes of the same numbers in float32 and in float64, and the numbers."""
    values = narrow(laws.grads(ROWS, spec))
    results = []
    for dtype in (torch.float32, torch.float64):
        its = {name: leaf._replace(dtype=dtype) for name, leaf in spec.items()}
        given = {name: value.to(dtype) for name, value in values.items()}
        results.append(transform(laws.fitted(transform, [given], its), given))
    return *results, {name: value.double() for name, value in values.items()}


def within(found: fa.Grads, exact: fa.Grads, scale: fa.Grads) -> None:
    assert list(found) == list(exact)
    for name, value in found.items():
        assert value.dtype == torch.float32
        error = (value.double() - exact[name]).abs()
        assert bool((error <= ROUNDINGS * UNIT * scale[name]).all()), (
            name,
            float((error / scale[name]).nan_to_num().max()),
        )


def magnitudes(transform: Transform, values: fa.Grads) -> fa.Grads:
    """|M| |x|: M in float64 is what becomes of every unit vector."""
    total = sum(value[0].numel() for value in values.values())
    units = torch.eye(total, dtype=torch.float64).split([value[0].numel() for value in values.values()], 1)
    basis = {name: unit.reshape(-1, *values[name].shape[1:]) for name, unit in zip(values, units, strict=True)}
    columns = transform(laws.fitted(transform, [values], laws.KERNELS), basis)
    sizes = torch.cat([value.flatten(1) for value in values.values()], 1).abs()
    return {name: (sizes @ of.flatten(1).abs()).reshape(-1, *of.shape[1:]) for name, of in columns.items()}


@pytest.mark.parametrize("name", LINEAR)
def test_a_linear_transform(name) -> None:
    transform = cases.TRANSFORMS[name]()
    found, exact, values = both(transform)
    within(found, exact, magnitudes(transform, values))


@pytest.mark.parametrize("name", POSITIVE)
def test_a_transform_without_cancellation(name) -> None:
    found, exact, _ = both(cases.TRANSFORMS[name]())
    within(found, exact, {name: value.abs() for name, value in exact.items()})


def test_cosines() -> None:
    """⟨g, q⟩ / ‖g‖: the product may cancel, the norm does not."""
    found, exact, values = both(cases.TRANSFORMS["inner_products_unit_norm"]())
    norm = torch.stack([value.flatten(1).square().sum(1) for value in values.values()]).sum(0).sqrt()
    products = magnitudes(cases.inner_products(), values)
    within(found, exact, {name: product / norm[:, None] for name, product in products.items()})


def test_adam_update() -> None:
    """(b g + a m) / (√(c v + d g²) + ε): numbers of two signs are added above the line."""
    transform = cases.TRANSFORMS["adam_update"]()
    found, exact, values = both(transform)
    scale: dict[str, Tensor] = {}
    state, _ = transform.init(laws.KERNELS)
    for name, g in values.items():
        first, second = state["adam"][name]["first"].double(), state["adam"][name]["second"].double()
        b, d, eps, a, c = state["adam"][name]["rates"]
        scale[name] = ((b * g).abs() + (a * first).abs()) / ((d * g * g + c * second).sqrt() + eps)
    within(found, exact, scale)


@pytest.mark.parametrize("name", ["cast_float16", "cast_bfloat16", "cast_int8"])
def test_a_cast_of_the_same_numbers_is_the_same(name) -> None:
    found, exact, _ = both(cases.TRANSFORMS[name]())
    laws.same(found, exact)


def test_every_transform_is_here() -> None:
    composed = {"project_wide", "adam_update_project"}  # nothing is computed; two of the above in turn
    here = {*LINEAR, *POSITIVE, *composed, "inner_products_unit_norm", "adam_update"}
    assert here == {name for name in cases.TRANSFORMS if not name.startswith("cast")}

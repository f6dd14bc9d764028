"""Sweeps: all of them in ``make test-all``, a part of each in ``make test``."""

import itertools
from collections.abc import Iterable

import pytest


def crossed(*axes: Iterable) -> list:
    """Return every combination as a test's parameters, all slow but for a cross-section.

    The cross-section has each value of each axis: as many combinations as the longest axis has values.
    """
    values = [list(axis) for axis in axes]
    section = {tuple(at % len(axis) for axis in values) for at in range(max(map(len, values)))}
    return [
        pytest.param(
            *(axis[at] for axis, at in zip(values, cell, strict=True)),
            marks=() if cell in section else pytest.mark.slow,
        )
        for cell in itertools.product(*(range(len(axis)) for axis in values))
    ]

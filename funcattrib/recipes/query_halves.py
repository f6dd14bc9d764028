"""Two halves of the queries, each with scores of its own: what they agree on is of the task, the rest is noise.

    a, b      the documents' scores by either half        spread = std((a + b) / 2)        noise = std(a − b) / 2

Where the queries say nothing of the documents, a and b are independent, and the spread is no larger than the noise.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

Members = Mapping[str, Sequence[int]]
"""Name of a column of scores → the queries that it is the mean of."""

LEAST_DOCUMENTS = 20
"""Below it two standard deviations say little."""


class Agreement(NamedTuple):
    """Standard deviations over the documents: of the halves' mean score, and of half of their difference."""

    spread: float
    noise: float


def half_columns(columns: Members) -> dict[str, Sequence[int]]:
    """Return two columns more for each that is the mean of several queries: either half of them.

    Example:
        >>> half_columns({"a": [0, 2, 5], "b": [1]})
        {'half 1 of a': [0, 5], 'half 2 of a': [2]}
    """
    return {
        f"half {half + 1} of {name}": members[half::2]
        for name, members in columns.items()
        for half in range(2)
        if len(members) > 1
    }


def agreement(scores: np.ndarray, columns: Members) -> Agreement | None:
    """Compare the largest score of each half of the queries, documents by documents; None where there is one query, or
    too few documents.

    Args:
        scores: (documents, columns), those of ``columns`` and then those of ``half_columns``.

    Example:
        >>> draw = np.random.default_rng(0)
        >>> task, noise = draw.normal(size=(200, 1)), draw.normal(size=(200, 4))
        >>> both = [agreement(part, {str(i): [i] for i in range(4)}) for part in (task + 0.1 * noise, noise)]
        >>> [round(each.spread / each.noise, 1) for each in both]
        [17.2, 1.1]
    """
    halves: tuple[list[int], list[int]] = ([], [])
    single = [number for number, members in enumerate(columns.values()) if len(members) == 1]
    for number, column in enumerate(single):
        halves[number % 2].append(column)
    for column in range(len(columns), scores.shape[1]):
        halves[(column - len(columns)) % 2].append(column)
    finite = scores[np.isfinite(scores).all(1)]
    if not all(halves) or len(finite) < LEAST_DOCUMENTS:
        return None
    one, other = (finite[:, half].max(1) for half in halves)
    return Agreement(float(np.std((one + other) / 2)), float(np.std(one - other) / 2))

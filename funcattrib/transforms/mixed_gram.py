"""TrackStar's mixed preconditioner: second moments of the queries and of the training data, weighed against each other.

    H = a H_query + (1 - a) H_train,        a σ_query[k] = (1 - a) σ_train[k]

σ are the eigenvalues of all blocks together, largest first. The directions that the queries have in common (their
template, the task) hold the largest of σ_query; a lets about k of them outweigh the training data's, and so be
divided out.

References: TrackStar, arXiv 2410.17413, §A.1.3 (k = 1000 of 65,536; a of about 0.9 for T-REx queries, 0.99 for C4).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from funcattrib.errors import ChainError
from funcattrib.runtime.world import SINGLE_PROCESS, World
from funcattrib.transforms.gram import spectrum
from funcattrib.transforms.precondition import Gram


class Mixed(NamedTuple):
    """Result of ``mix_grams``.

    Attributes:
        gram: block → H, (D, D) float64, for ``precondition(gram=…)``.
        weight: a, between 0 and 1.
        component: the k at which the spectra cross; smaller than asked where there were not so many.

    Example:
        >>> Mixed({"w": torch.eye(2)}, weight=0.5, component=2).weight
        0.5
    """

    gram: dict[str, Tensor]
    weight: float
    component: int


def mix_grams(query: Gram, train: Gram, k: int = 1000, world: World = SINGLE_PROCESS) -> Mixed:
    """Compute H = a H_query + (1 - a) H_train, block by block, with one a for all blocks.

    a = σ_train[k] / (σ_query[k] + σ_train[k]), k counted from 1 over the eigenvalues of all blocks together. Where one
    of the two has fewer than k eigenvalues above zero (fewer coordinates, or fewer gradients than directions), the last
    one that both have is taken: beyond it the ratio would be one of rounding errors. A Gram that is zero altogether
    gets no weight; of two such, half each.

    Args:
        query, train: H of each block, undamped, the same blocks in both (``gram_matrices``).
        k: how many directions are to be weighed down.
        world: processes that each have some of the blocks; a is of all of them.

    Raises:
        ChainError: k below 1; blocks that differ.

    Example:
        >>> import torch
        >>> query, train = torch.diag(torch.tensor([9.0, 1.0])), torch.diag(torch.tensor([4.0, 3.0]))
        >>> mixed = mix_grams({"w": query}, {"w": train}, k=2)
        >>> mixed.weight, mixed.component
        (0.75, 2)
        >>> mixed.gram["w"].diag()
        tensor([7.7500, 1.5000], dtype=torch.float64)
    """
    if k < 1:
        raise ChainError(f"expected k of at least 1, found {k}")
    if differing := sorted(query.keys() ^ train.keys()):
        raise ChainError(
            f"the block {differing[0]!r} is in one of the two Gram matrices only; give both the same blocks"
        )
    for block, matrix in query.items():
        if matrix.shape != train[block].shape:
            raise ChainError(
                f"expected Gram matrices of {block} of the same shape, "
                f"found {tuple(matrix.shape)} and {tuple(train[block].shape)}"
            )
    weight, component = _weight(_pooled(query, world), _pooled(train, world), k)
    gram = {block: weight * query[block].double() + (1 - weight) * train[block].double() for block in query}
    return Mixed(gram, weight, component)


def _pooled(gram: Gram, world: World) -> Tensor:
    return torch.cat(world.all_gather(spectrum(gram))).sort(descending=True).values


def _weight(query: Tensor, train: Tensor, k: int) -> tuple[float, int]:
    """Compute a, and the k it was found at."""
    seen_query, seen_train = int((query > 0).sum()), int((train > 0).sum())
    component = min(k, seen_query, seen_train)
    if component == 0:
        return (0.5 if seen_query == seen_train else float(seen_query > 0)), 0
    of_query, of_train = float(query[component - 1]), float(train[component - 1])
    return of_train / (of_query + of_train), component

"""One random sketch of the whole gradient, all leaves together: TRAK's global projection.

    C(G) = Σ_w S_w vec(G_w), (k,)        E⟨C(G), C(G′)⟩ = Σ_w ⟨G_w, G′_w⟩

S = (S_w)_w is a sparse Johnson–Lindenstrauss transform: a column has ``sparsity`` entries ±1/√sparsity, one in each of
so many blocks of k/sparsity rows, hashed from (seed, leaf name, position) as it goes. Nothing of size k × parameters is
ever held: each weight's gradient is formed in its turn, a few rows at a time; after ``project``, its small coordinates.

References: TRAK, arXiv 2303.14186; SJLT of gradients, GraSS, arXiv 2505.18976.
"""

from functools import partial

from funcattrib.chain.transform import State, Transform
from funcattrib.errors import ChainError
from funcattrib.lift import Readout, Readouts
from funcattrib.lift.maps.sketch import Sketched
from funcattrib.types import Leaf, Spec

LEAF = "sketch"


def sketch(k: int = 4096, seed: int = 0, sparsity: int = 1) -> Transform:
    """Sketch all leaves together into one leaf, ``sketch`` (k,).

    Args:
        k: length of the result.
        seed: of the hash.
        sparsity: entries a column; more cost as many times as much and make the sketch a little less noisy.

    Raises:
        ChainError: k or sparsity below 1, or k no multiple of sparsity.

    Example:
        >>> import torch
        >>> grads = {"w": torch.ones(7, 3, 5), "b": torch.ones(7, 3)}
        >>> sketch(8)(None, grads)["sketch"].shape
        torch.Size([7, 8])
    """
    if k < 1 or sparsity < 1 or k % sparsity:
        raise ChainError(
            f"expected k and sparsity of at least 1, and k divisible by sparsity, found k={k}, sparsity={sparsity}"
        )
    return Transform(
        "sketch",
        settings={"k": k, "seed": seed, "sparsity": sparsity},
        init=partial(_init, k=k, seed=seed, sparsity=sparsity),
        maps=partial(_maps, k=k, seed=seed, sparsity=sparsity),
    )


def _init(spec: Spec, k: int, seed: int, sparsity: int) -> tuple[State, Spec]:
    return None, {LEAF: Leaf((k,), next(iter(spec.values())).dtype)}


def _maps(state: State, spec: Spec, k: int, seed: int, sparsity: int) -> Readouts:
    return {name: Readout(Sketched(name, leaf.shape, k, seed, sparsity), LEAF, (LEAF,)) for name, leaf in spec.items()}

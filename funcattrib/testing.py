"""Laws that every transform obeys, to check a new one: ``check_transform(transform)``.

    plain settings     they survive JSON, as a manifest keeps them
    row by row         row b of the result depends on row b alone
    announced          ``init`` announces the shapes and dtypes that are produced
    maps agree         a map reads the same of factors as of the gradient; its adjoint is one: ⟨C(G), θ⟩ = ⟨G, C*(θ)⟩
    fit                the state does not depend on how the data is split into batches, nor on their order
    state              survives a file bit for bit
    leaves             a leaf's result does not depend on the others, unless the transform joins them

They are about mathematics and hold in float64, where rounding is far below any mistake.
"""

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from funcattrib.chain import state_tree
from funcattrib.chain.transform import State, Transform
from funcattrib.kernels.safe_norm import as_rows
from funcattrib.lift.factors import outer
from funcattrib.types import Grads, Leaf, Spec

MATRICES: Spec = {
    "matrix": Leaf((7, 9), torch.float64),
    "layer.dense.weight": Leaf((12, 3), torch.float64),
    "layer.out.weight": Leaf((4, 11), torch.float64),
}
VECTORS: Spec = {**MATRICES, "layer.out.weight.vector.weight": Leaf((8,), torch.float64)}
KERNELS: Spec = {
    **VECTORS,
    "conv1d.weight": Leaf((6, 3, 4), torch.float64),
    "conv2d.weight": Leaf((7, 2, 3, 2), torch.float64),
    "mlp.experts.down_proj.weight": Leaf((3, 6, 7), torch.float64),
}


def check_transform(transform: Transform, *, joint: bool = False, spec: Spec | None = None) -> None:
    """Check that a transform obeys the laws, on random gradients of matrices, vectors, kernels and a stack of experts.

    Args:
        transform: as it stands in a chain; a fitted one is fitted here.
        joint: it joins leaves on purpose (as ``unit_norm`` does): the law of leaves is skipped.
        spec: the leaves to check it on, in float64; by default ``MATRICES``, ``VECTORS`` and ``KERNELS``.

    Raises:
        AssertionError: naming the law that does not hold, and the leaves.

    Example:
        >>> import funcattrib as fa
        >>> check_transform(fa.project(4))
        >>> check_transform(fa.unit_norm(), joint=True)
        >>> check_transform(fa.project(4)._replace(maps=None), joint=True)
        Traceback (most recent call last):
        AssertionError: project breaks the law 'announced spec is produced' on matrix, layer.dense.weight, ...
    """
    laws: list[Callable[[Transform, Spec], None]] = [
        settings_are_plain,
        apply_is_row_by_row,
        announced_spec_is_produced,
        maps_agree,
        fit_ignores_splits_and_order,
        state_survives_a_file,
        *([] if joint else [other_leaves_do_not_matter]),
    ]
    for leaves in (MATRICES, VECTORS, KERNELS) if spec is None else (spec,):
        for law in laws:
            try:
                law(transform, leaves)
            except AssertionError as error:
                name = law.__name__.replace("_", " ")
                raise AssertionError(f"{transform.name} breaks the law {name!r} on {', '.join(leaves)}") from error


def grads(rows: int, spec: Spec = MATRICES, seed: int = 0) -> Grads:
    """Return ``rows`` random gradients of every leaf."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(rows, *leaf.shape, generator=generator, dtype=leaf.dtype) for name, leaf in spec.items()}


def fitted(transform: Transform, parts: Sequence[Grads], spec: Spec = MATRICES) -> State:
    """Return the state after one pass over ``parts``."""
    state = transform.init(spec)[0]
    for part in parts:
        state = transform.observe(state, transform.observed(part))
    return transform.finalize(state)


def split(values: Grads, sizes: Sequence[int]) -> list[Grads]:
    """Divide gradients into batches of these sizes."""
    pieces = {name: value.split(list(sizes)) for name, value in values.items()}
    return [{name: pieces[name][i] for name in values} for i in range(len(sizes))]


def close(a: Mapping[str, Tensor], b: Mapping[str, Tensor], tolerance: float = 1e-10) -> None:
    """Check that two results are equal up to rounding.

    Sums of a few hundred terms lose 1e-13 of the largest value, H^-½ a hundredfold of it.

    Values of fewer digits (after a cast) may be one rounding step apart.
    """
    assert list(a) == list(b)
    for name in a:
        digits = max(tolerance, torch.finfo(b[name].dtype).eps)
        torch.testing.assert_close(a[name], b[name], rtol=digits, atol=tolerance * float(b[name].abs().max()))


def settings_are_plain(transform: Transform, spec: Spec) -> None:
    """Check that the settings are values that a manifest can keep."""
    try:
        kept = json.loads(json.dumps(transform.describe()))
    except TypeError as error:
        raise AssertionError(str(error)) from error
    assert list(kept) == list(transform.describe()), "names of settings are text"


def apply_is_row_by_row(transform: Transform, spec: Spec) -> None:
    """Check that row b of the result depends on row b alone."""
    values = grads(6, spec)
    state = fitted(transform, [values], spec)
    whole = transform(state, values)
    for b in range(6):
        alone = transform(state, {n: v[b : b + 1] for n, v in values.items()})
        close({n: v[b : b + 1] for n, v in whole.items()}, alone)


def announced_spec_is_produced(transform: Transform, spec: Spec) -> None:
    """Check the shapes and dtypes that ``init`` announces."""
    state = fitted(transform, [grads(3, spec)], spec)
    produced = transform(state, grads(3, spec))
    announced = {name: (leaf.shape, leaf.dtype) for name, leaf in transform.init(spec)[1].items()}
    assert {n: (tuple(v.shape[1:]), v.dtype) for n, v in produced.items()} == announced


def maps_agree(transform: Transform, spec: Spec) -> None:
    """Check that a map reads of factors what it reads of the gradient they form, and the adjoint of a linear one."""
    if transform.maps is None:
        return
    values = grads(5, spec)
    state = fitted(transform, [values], spec)
    for name, (gradient_map, _, _) in transform.maps(state, spec).items():
        shape, dtype = spec[name].shape, spec[name].dtype
        read = gradient_map.from_gradient(values[name])
        assert tuple(read.shape[1:]) == gradient_map.coordinates_shape(shape), (
            f"{name} has coordinates of another shape"
        )
        if len(shape) in (1, 2):  # of more axes, the operation says what the factors are
            rows, *others = (torch.randn(5, 3, n, dtype=dtype) for n in shape)
            cols = others[0] if others else None
            reduced = None if cols is None else gradient_map.reduce_cols(cols)
            of_factors = gradient_map.from_factors(gradient_map.reduce_rows(rows), reduced)
            close({name: of_factors}, {name: gradient_map.from_gradient(outer(rows, cols))})
        if gradient_map.linear:  # ⟨C(G), θ⟩ = ⟨G, C*(θ)⟩
            theta = torch.randn(read.shape[1:], dtype=dtype)
            left = as_rows(read * theta).sum(1)
            right = as_rows(values[name] * gradient_map.adjoint(theta)).sum(1)
            close({name: left}, {name: right})


def fit_ignores_splits_and_order(transform: Transform, spec: Spec) -> None:
    """Check that the state does not depend on batches or their order."""
    values = grads(14, spec)
    once = state_tree.flatten(fitted(transform, [values], spec))
    for sizes in ([7, 7], [2] * 7):
        parts = split(values, sizes)
        for order in (parts, parts[::-1]):
            close(state_tree.flatten(fitted(transform, order, spec)), once)


def state_survives_a_file(transform: Transform, spec: Spec) -> None:
    """Check that a saved and restored state is the same, and does the same."""
    state = fitted(transform, [grads(4, spec)], spec)
    flat = state_tree.flatten(state)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "state.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in flat.items()}, file)
        restored = state_tree.restore(transform.init(spec)[0], load_file(file))
    assert all(torch.equal(a, b) for a, b in zip(state_tree.flatten(restored).values(), flat.values(), strict=True))
    same(transform(restored, grads(2, spec)), transform(state, grads(2, spec)))


def other_leaves_do_not_matter(transform: Transform, spec: Spec) -> None:
    """Check that a leaf alone comes out as it does among others."""
    values = grads(4, spec)
    whole = transform(fitted(transform, [values], spec), values)
    for name in {leaf.partition("#")[0] for leaf in whole}:
        if transform.name.startswith("split_") and name in whole:
            continue  # was not divided, and alone there is nothing to divide
        part_spec, part = {name: spec[name]}, {name: values[name]}
        leaves = {leaf: grad for leaf, grad in whole.items() if leaf.partition("#")[0] == name}
        same(leaves, transform(fitted(transform, [part], part_spec), part))


def same(a: Grads, b: Grads) -> None:
    """Check that two results are equal to the bit."""
    assert list(a) == list(b)
    assert all(torch.equal(a[name], b[name]) for name in a)

"""Laws that every transform obeys; ``test_laws.py`` runs each over the whole table.

They are about mathematics and hold in float64, where rounding is far below any mistake. How far float32 may be from it
is ``test_float32.py``'s.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

import funcattrib as fa
from funcattrib import tree
from funcattrib.compose import Chain, Transform, applied, settings
from funcattrib.lift import unpack
from funcattrib.per_example import Grads, Spec

SPEC: Spec = {
    "matrix": fa.Leaf((7, 9), torch.float64),
    "layer.dense.weight": fa.Leaf((12, 3), torch.float64),
    "layer.out.weight": fa.Leaf((4, 11), torch.float64),
}
VECTORS: Spec = {**SPEC, "layer.out.weight.vector.weight": fa.Leaf((8,), torch.float64)}
KERNELS: Spec = {
    **VECTORS,
    "conv1d.weight": fa.Leaf((6, 3, 4), torch.float64),
    "conv2d.weight": fa.Leaf((7, 2, 3, 2), torch.float64),
    "mlp.experts.down_proj.weight": fa.Leaf((3, 6, 7), torch.float64),
}


def grads(rows: int, spec: Spec = SPEC, seed: int = 0) -> Grads:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(rows, *leaf.shape, generator=generator, dtype=leaf.dtype) for name, leaf in spec.items()}


def fitted(transform: Transform, parts: Sequence[Grads], spec: Spec = SPEC):
    """The state after one pass over ``parts``."""
    state = transform.init(spec)[0]
    for part in parts:
        measured = part if transform.measure is None else {n: transform.measure(n, g) for n, g in part.items()}
        state = transform.observe(state, measured)
    return transform.finalize(state)


def split(values: Grads, sizes: Sequence[int]) -> list[Grads]:
    pieces = {name: value.split(list(sizes)) for name, value in values.items()}
    return [{name: pieces[name][i] for name in values} for i in range(len(sizes))]


def close(a: Mapping[str, Tensor], b: Mapping[str, Tensor], tolerance: float = 1e-10) -> None:
    """Equal up to rounding: sums of a few hundred terms lose 1e-13 of the largest value, H^-½ a hundredfold of it.

    Values of fewer digits (after a cast) may be one rounding step apart.
    """
    assert list(a) == list(b)
    for name in a:
        digits = max(tolerance, torch.finfo(b[name].dtype).eps)
        torch.testing.assert_close(a[name], b[name], rtol=digits, atol=tolerance * float(b[name].abs().max()))


def apply_is_row_by_row(transform: Transform, spec: Spec) -> None:
    values = grads(6, spec)
    state = fitted(transform, [values], spec)
    whole = applied(transform, state, values)
    for b in range(6):
        alone = applied(transform, state, {n: v[b : b + 1] for n, v in values.items()})
        close({n: v[b : b + 1] for n, v in whole.items()}, alone)


def announced_spec_is_produced(transform: Transform, spec: Spec) -> None:
    state = fitted(transform, [grads(3, spec)], spec)
    produced = applied(transform, state, grads(3, spec))
    announced = {name: (leaf.shape, leaf.dtype) for name, leaf in transform.init(spec)[1].items()}
    assert {n: (tuple(v.shape[1:]), v.dtype) for n, v in produced.items()} == announced


def lowered_is_plain(transform: Transform, spec: Spec) -> None:
    if transform.lower is None:
        return
    values = grads(5, spec)
    state = fitted(transform, [values], spec)
    maps = transform.lower(state, spec)
    readings = {name: how.reading for name, how in maps.items()}
    by_probe: Grads = {}
    for name, how in maps.items():  # parameters that share a probe add up in it
        by_probe[how.probe] = by_probe.get(how.probe, 0) + how.reading.of_gradient(values[name])
    close(unpack(maps, by_probe), applied(transform, state, values))
    for name, reading in readings.items():  # ⟨C(G), θ⟩ = ⟨G, C*(θ)⟩
        theta = torch.randn(reading.coordinates_shape(spec[name].shape), dtype=spec[name].dtype)
        left = (reading.of_gradient(values[name]) * theta).flatten(1).sum(1)
        right = (values[name] * reading.adjoint(theta)).flatten(1).sum(1)
        close({name: left}, {name: right})


def fit_ignores_splits_and_order(transform: Transform, spec: Spec) -> None:
    values = grads(14, spec)
    once = tree.flatten(fitted(transform, [values], spec))
    for sizes in ([7, 7], [2] * 7):
        parts = split(values, sizes)
        for order in (parts, parts[::-1]):
            close(tree.flatten(fitted(transform, order, spec)), once)


def state_survives_a_file(transform: Transform, spec: Spec, folder) -> None:
    from safetensors.torch import load_file, save_file

    state = fitted(transform, [grads(4, spec)], spec)
    flat = tree.flatten(state)
    save_file({k: v.contiguous() for k, v in flat.items()}, folder / "state.safetensors")
    restored = tree.restore(transform.init(spec)[0], load_file(folder / "state.safetensors"))
    assert all(torch.equal(a, b) for a, b in zip(tree.flatten(restored).values(), flat.values(), strict=True))
    same(applied(transform, restored, grads(2, spec)), applied(transform, state, grads(2, spec)))


def other_leaves_do_not_matter(transform: Transform, spec: Spec) -> None:
    bound = settings(transform)
    joint = bound.get("groups", "parameter") != "parameter" or bound.get("dtype") == "int8"
    if (
        transform.name in ("unit_norm", "sketch", "clip", "against", "self_influence") or joint
    ):  # over all leaves together, on purpose
        return
    values = grads(4, spec)
    whole = applied(transform, fitted(transform, [values], spec), values)
    for name in {leaf.partition("#")[0] for leaf in whole}:
        if transform.name.startswith("split_") and name in whole:
            continue  # was not divided, and alone there is nothing to divide
        own, part = {name: spec[name]}, {name: values[name]}
        leaves = {leaf: grad for leaf, grad in whole.items() if leaf.partition("#")[0] == name}
        same(leaves, applied(transform, fitted(transform, [part], own), part))


def same(a: Grads, b: Grads) -> None:
    assert list(a) == list(b)
    assert all(torch.equal(a[name], b[name]) for name in a)


def states(chain: Chain, state: tuple) -> list[Tensor]:
    return list(tree.flatten(state).values())

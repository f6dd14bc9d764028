"""Convolutions against the plain loop of autograd in float64, under vmap and in ordinary batched autograd."""

import copy

import pytest
import torch
from torch import Tensor, nn

import funcattrib as fa
from funcattrib import testing as laws
from funcattrib.chain.per_example import spec
from funcattrib.lift.lifted import Lifted
from funcattrib.lift.maps.conv import patches
from funcattrib.training.capture import collecting
from tests.support.sweeps import crossed

CASES = {
    "1d": (lambda: nn.Conv1d(3, 4, 3), (3, 11)),
    "1d stride padding dilation groups": (
        lambda: nn.Conv1d(4, 6, 3, stride=2, padding=2, dilation=2, groups=2),
        (4, 12),
    ),
    "1d same, even kernel": (lambda: nn.Conv1d(3, 4, 4, padding="same"), (3, 9)),
    "1d valid without bias": (lambda: nn.Conv1d(3, 4, 2, padding="valid", bias=False), (3, 9)),
    "1d depthwise causal": (lambda: nn.Conv1d(6, 6, 4, padding=3, groups=6), (6, 7)),
    "2d": (lambda: nn.Conv2d(3, 4, (3, 2), stride=(1, 2), padding=(1, 0)), (3, 6, 7)),
    "2d same dilation groups": (lambda: nn.Conv2d(4, 4, 3, padding="same", dilation=(1, 2), groups=2), (4, 5, 6)),
    "2d reflected": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), (2, 5, 5)),
    "3d": (
        lambda: nn.Conv3d(2, 4, (2, 3, 2), stride=(1, 2, 1), padding=(0, 1, 1), dilation=(1, 1, 2), groups=2),
        (2, 4, 5, 4),
    ),
}
CHAINS = {
    "itself": (fa.select("*"),),
    "project": (fa.project(3),),
    "project wide": (fa.project(1000),),
    "adafactor_norm": (fa.adafactor_norm(),),
    "adafactor_norm project": (fa.adafactor_norm(), fa.project(3)),
    "project adafactor_norm": (fa.project(3), fa.adafactor_norm()),
    "adam_norm project": (fa.adam_norm(), fa.project(3)),
    "sketch": (fa.sketch(10),),
    "project sketch": (fa.project(3), fa.sketch(10)),
}


class Net(nn.Module):
    """A convolution used twice, at other lengths, behind and before something that is not linear."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.conv(x).tanh(), self.conv(x.flip(-1).sin())
        return (first * second).flatten(1).sum(1) + first.square().flatten(1).sum(1)


def made(name: str) -> tuple[Net, Tensor]:
    torch.manual_seed(0)
    make, shape = CASES[name]
    return Net(make()), torch.randn(5, *shape)


def loop(net: nn.Module, x: Tensor) -> dict[str, Tensor]:
    double, rows = copy.deepcopy(net).double(), []
    for one in x.double():
        double.zero_grad()
        double(one[None])[0].backward()
        rows.append({name: p.grad.clone() for name, p in double.named_parameters()})
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


@pytest.fixture
def no_dense_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    def dense(self: Lifted, operation: str = "") -> Tensor:
        raise AssertionError(f"{operation} fell back to the dense form")

    monkeypatch.setattr(Lifted, "dense", dense)


def compare(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    laws.close({name: value.double() for name, value in ours.items()}, expected, 1e-4)


@pytest.mark.usefixtures("no_dense_fallback")
@pytest.mark.parametrize(("name", "chain"), crossed(CASES, CHAINS))
def test_under_vmap_and_in_batched_autograd(name: str, chain: str) -> None:
    net, x = made(name)
    parts = fa.functionalize(net, "all")

    def loss(params: dict[str, Tensor], example: dict[str, Tensor]) -> Tensor:
        return parts.call(params, example["x"][None])[0]

    attribute, batch = fa.compose(fa.per_example_grad, *CHAINS[chain]), {"x": x}
    state = attribute.fit(loss, parts.params, [batch])
    expected = fa.compose(*CHAINS[chain]).apply(state, loop(net, x))
    compare(attribute(loss, parts.params, batch, state), expected)

    with collecting(net, dict(net.named_parameters()), attribute, state) as collected:
        net(x).sum().backward()
    compare(collected.coordinates(), expected)


@pytest.mark.usefixtures("no_dense_fallback")
@pytest.mark.parametrize("name", ["1d", "2d", "3d"])
def test_an_input_without_batch_axis(name: str) -> None:
    torch.manual_seed(0)
    make, shape = CASES[name]
    conv, x = make(), torch.randn(4, *shape)
    parts = fa.functionalize(conv, "all")
    grads = fa.compose(fa.per_example_grad, fa.project(2))(
        lambda params, example: parts.call(params, example["x"]).square().sum(), parts.params, {"x": x}
    )
    expected = fa.compose(fa.per_example_grad, fa.project(2))(
        lambda params, example: parts.call(params, example["x"][None]).square().sum(), parts.params, {"x": x}
    )
    laws.close(grads, expected)


def test_project_is_that_of_the_flattened_kernel() -> None:
    stage, values = fa.project(3), laws.grads(4, laws.KERNELS)
    state, announced = stage.init(laws.KERNELS)
    assert {n: leaf.shape for n, leaf in announced.items() if "conv" in n or "experts" in n} == {
        "conv1d.weight": (3, 3),
        "conv2d.weight": (3, 3),
        "mlp.experts.down_proj.weight": (3, 3, 3),
    }
    for name in ("conv1d.weight", "conv2d.weight"):
        flat = {
            name: fa.Leaf(
                (announced[name].shape[0] and values[name].shape[1], values[name][0, 0].numel()), torch.float32
            )
        }
        as_matrix = stage(stage.init(flat)[0], {name: values[name].flatten(2)})
        laws.close({name: stage(state, values)[name]}, as_matrix)


def test_adafactor_formula_on_kernels_and_stacks() -> None:
    values = {n: g for n, g in laws.grads(10, laws.KERNELS).items() if g.ndim > 3}
    spec_ = {name: laws.KERNELS[name] for name in values}
    stage = fa.adafactor_norm()
    ours = stage(laws.fitted(stage, [values], spec_), values)
    for name, g in values.items():
        matrices = g.double() if "experts" in name else g.double().flatten(2)[:, None]  # (B, x, o, i)
        r, c = matrices.square().mean((0, 3)), matrices.square().mean((0, 2))
        scale = (r.mean(1)[:, None, None] / (r[:, :, None] * c[:, None, :])).sqrt()
        torch.testing.assert_close(ours[name].double(), (matrices * scale).reshape(g.shape), rtol=1e-5, atol=1e-6)
    given = {name: g.double().square().mean(0) for name, g in values.items()}  # an optimizer's v
    again = fa.adafactor_norm(given)
    laws.close(again(again.init(spec_)[0], values), ours)


def test_patches_are_those_of_unfold() -> None:
    x = torch.randn(2, 3, 7, 6)
    ours = patches(x, (3, 2), (2, 1), ((1, 1), (2, 2)), (1, 2))
    theirs = nn.functional.unfold(x, (3, 2), dilation=(1, 2), padding=(1, 2), stride=(2, 1)).mT
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_spec_of_a_kernel_is_kept() -> None:
    conv = nn.Conv2d(3, 4, 3)
    assert spec(dict(conv.named_parameters()))["weight"].shape == (4, 3, 3, 3)

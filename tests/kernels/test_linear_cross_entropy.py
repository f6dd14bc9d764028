"""The fused head against its formulas on whole logits in float64."""

import pytest
import torch
from torch import Tensor
from torch.func import grad, vmap

from funcattrib.kernels.head_tokens import Operands
from funcattrib.kernels.linear_cross_entropy import Reference, head_loss, linear_cross_entropy
from funcattrib.kernels.logit_loss import Head
from tests.support.sweeps import crossed
from tests.support.tensor_sizes import tensor_sizes

EXAMPLES, TOKENS, WIDTH, VOCABULARY = 3, 200, 8, 37  # more tokens than one chunk


def logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    z = hidden @ weight.T if bias is None else hidden @ weight.T + bias
    z = z * scale
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def plain(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    factor: Tensor | None,
    head: Head,
    reference: Reference | None,
) -> Tensor:
    """Σ over labelled tokens, written from the definitions."""
    z = logits(hidden, weight, bias, head.scale, head.softcap)
    labelled = target != -100
    y = torch.nn.functional.one_hot(target.clamp(min=0), VOCABULARY).to(z.dtype)
    if head.kind == "ce":
        wanted = (1 - head.smoothing) * y + head.smoothing / VOCABULARY
        per_token = -(wanted * torch.log_softmax(z, -1)).sum(-1)
    elif head.kind == "kl":
        q = torch.distributions.Categorical(logits=logits(*reference, *head.reference))
        per_token = torch.distributions.kl_divergence(torch.distributions.Categorical(logits=z), q)
    else:
        p = (y * torch.softmax(z, -1)).sum(-1)
        per_token = -(p.log() - (1 - p).log())
    weights = labelled.to(z.dtype) if factor is None else labelled * factor
    return (per_token * weights).sum(-1)


def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(0, VOCABULARY, (EXAMPLES, TOKENS), generator=generator)
    target[:, ::3] = -100
    target[2] = -100
    draw = {
        "hidden": (EXAMPLES, TOKENS, WIDTH),
        "weight": (VOCABULARY, WIDTH),
        "bias": (VOCABULARY,),
        "factor": (EXAMPLES, TOKENS),
        "reference_hidden": (EXAMPLES, TOKENS, WIDTH + 3),
        "reference_weight": (VOCABULARY, WIDTH + 3),
        "reference_bias": (VOCABULARY,),
    }
    tensors = {n: torch.randn(*shape, generator=generator, dtype=torch.float64) for n, shape in draw.items()}
    tensors["factor"][0, :50] = 0
    return {**tensors, "target": target}


HEADS = {
    "cross-entropy": Head(),
    "scaled": Head(scale=0.3),
    "smoothed": Head(smoothing=0.2),
    "soft-capped": Head(softcap=1.5, scale=2.0),
    "log-odds": Head(kind="log_odds"),
    "log-odds, soft-capped": Head(kind="log_odds", softcap=3.0),
    "divergence": Head(kind="kl"),
    "divergence, soft-capped": Head(kind="kl", scale=0.5, softcap=2.0, reference=(0.7, 1.5)),
}


EXTRAS = [(), ("bias",), ("factor",), ("bias", "factor")]
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


@pytest.mark.parametrize(("name", "extras", "dtype"), crossed(HEADS, EXTRAS, DTYPES))
def test_loss_and_gradients(name, extras, dtype) -> None:
    head, x = HEADS[name], inputs()
    bias, factor = (x[n] if n in extras else None for n in ("bias", "factor"))
    reference = None
    if head.kind == "kl":
        reference = Reference(*(x[f"reference_{n}"].to(dtype) for n in ("hidden", "weight")), None)
        if bias is not None:
            reference = reference._replace(bias=x["reference_bias"].to(dtype))
    exact_reference = reference and Reference(*(t if t is None else t.double() for t in reference))
    leaves = [t for t in (x["hidden"], x["weight"], bias) if t is not None]
    leaves = [t.to(dtype).double().requires_grad_() for t in leaves]
    own_bias = leaves[2] if bias is not None else None
    expected = plain(leaves[0], leaves[1], own_bias, x["target"], factor, head, exact_reference)
    scale = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    wanted = torch.autograd.grad((expected * scale).sum(), leaves)
    close = {torch.float64: 1e-9, torch.float32: 2e-5, torch.bfloat16: 2e-2}[dtype]

    def check(ours: Tensor, exact: Tensor) -> None:
        torch.testing.assert_close(ours.double(), exact, rtol=close, atol=close * float(exact.abs().max()))

    own = [t.detach().to(dtype).requires_grad_() for t in leaves]
    own_bias = own[2] if bias is not None else None
    own_factor = None if factor is None else factor.to(dtype)
    loss = linear_cross_entropy(own[0], own[1], x["target"], own_bias, own_factor, head, reference)
    check(loss, expected.detach())
    for a, b in zip(torch.autograd.grad((loss * scale.to(loss.dtype)).sum(), own), wanted, strict=True):
        check(a, b)

    def one(parameters, hidden, target, factor, reference_hidden):
        a = None if own_factor is None else factor[None]
        b = parameters[1] if bias is not None else None
        r = reference and reference._replace(hidden=reference_hidden[None])
        return linear_cross_entropy(hidden[None], parameters[0], target[None], b, a, head, r)[0]

    parameters = tuple(t.detach() for t in own[1:])
    unused = x["hidden"]
    rows = vmap(grad(one, argnums=(0, 1)), in_dims=(None, 0, 0, 0, 0))(
        parameters,
        own[0].detach(),
        x["target"],
        own_factor if own_factor is not None else unused[..., 0],
        unused if reference is None else reference.hidden,
    )
    check((rows[1] * scale.to(dtype)[:, None, None]), wanted[0])
    for ours, exact in zip(rows[0], wanted[1:], strict=True):
        check((ours.double() * scale.reshape(-1, *[1] * (ours.ndim - 1))).sum(0), exact)


def test_certain_tokens_stay_finite() -> None:
    weight = torch.eye(4) * 200
    hidden = torch.eye(4)[None]
    for kind, expected in (("ce", 0.0), ("log_odds", -200 + torch.tensor(3.0).log().item())):
        loss = linear_cross_entropy(hidden, weight, torch.arange(4)[None], head=Head(kind=kind))
        torch.testing.assert_close(loss, torch.tensor([4 * expected]))
    wrong = linear_cross_entropy(hidden, weight, torch.tensor([[1, 2, 3, 0]]))
    torch.testing.assert_close(wrong, torch.tensor([800.0]))


def test_the_same_distribution_has_no_divergence() -> None:
    x, head = inputs(), Head(kind="kl")
    hidden, weight = x["hidden"].float() * 5, x["weight"].float()
    hidden.requires_grad_()
    loss = linear_cross_entropy(
        hidden, weight, x["target"], head=head, reference=Reference(hidden.detach(), weight.clone())
    )
    assert not loss.any()
    assert not torch.autograd.grad(loss.sum(), hidden)[0].any()


def test_gradients_of_the_weight_are_summed_as_they_come() -> None:
    """In batched autograd no gradient an example is held: one (V, d) is all there is beside the chunk."""
    examples, vocabulary, width = 64, 500, 64
    hidden = torch.randn(examples, 4, width)
    weight = torch.randn(vocabulary, width, requires_grad=True)
    loss = linear_cross_entropy(hidden, weight, torch.randint(0, vocabulary, (examples, 4))).sum()
    with tensor_sizes() as made:
        torch.autograd.grad(loss, weight)
    assert max(made) <= max(vocabulary * width, 2 * 128 * vocabulary)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("sure", [0.0, 0.3, 0.95])
@pytest.mark.parametrize("kind", ["ce", "log_odds"])
def test_the_attention_over_the_vocabulary_is_the_loss_of_the_logits(kind, sure, weighted) -> None:
    """With few and with many tokens that the model is sure of, beyond the first ones by which it is judged."""
    generator = torch.Generator().manual_seed(0)
    examples, tokens, width, vocabulary = 2, 200, 12, 37
    weight = torch.randn(vocabulary, width, generator=generator)
    target = torch.randint(vocabulary, (examples, tokens), generator=generator)
    hidden = torch.randn(examples, tokens, width, generator=generator)
    known = torch.rand(examples, tokens, generator=generator) < sure
    hidden = torch.where(known[..., None], weight[target] * 0.8, hidden)
    target[0, :7] = -100
    weights = torch.rand(examples, tokens, generator=generator) if weighted else None
    left = torch.randn(5, vocabulary, generator=generator)
    x = Operands(hidden.requires_grad_(), weight, target, None, weights)
    losses, rows = head_loss(x, left, Head(kind))
    alone, _ = head_loss(x, None, Head(kind))
    h = hidden.detach().double().requires_grad_()
    z = (h @ weight.double().T).requires_grad_()
    z.retain_grad()
    y = target.clamp(min=0)[..., None]
    z_y = z.gather(-1, y)[..., 0]
    others = z if kind == "ce" else z.scatter(-1, y, float("-inf"))
    per_token = (others.logsumexp(-1) - z_y) * (target != -100) * (1 if weights is None else weights.double())
    per_token.sum().backward()
    for found in (losses, alone):
        torch.testing.assert_close(found.double(), per_token.sum(1), rtol=1e-5, atol=1e-4)
        (gradient,) = torch.autograd.grad(found.sum(), hidden, retain_graph=True)
        torch.testing.assert_close(gradient.double(), h.grad, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(rows.double(), z.grad @ left.double().T, rtol=1e-4, atol=2e-5)

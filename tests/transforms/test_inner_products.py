"""Scores against queries: the forms against each other, against a loop, and against forward-mode differentiation."""

from dataclasses import replace

import pytest
import torch
from torch.func import jvp, vmap

import funcattrib as fa
from funcattrib.chain.per_example import rows
from funcattrib.chain.per_token import per_token_grad
from funcattrib.lift.factors import OneHot, outer
from funcattrib.lift.maps.inner_products import InnerProducts
from tests.support import cases
from tests.support.sweeps import crossed

MODELS = ["gpt_neox", "gpt2", "llama_tied", "mixtral", "mamba"]


def setting(name, modules="all", count=3, exclude=()):
    model = cases.causal(name)
    names = [n for n, p in model.named_parameters() if p.ndim < 3] if name == "mamba" and modules == "all" else modules
    loss, params = fa.causal_lm_loss(model, modules=names, exclude=exclude)
    generator = torch.Generator().manual_seed(0)
    queries = {n: torch.randn(count, *p.shape, generator=generator) / p.numel() ** 0.5 for n, p in params.items()}
    return loss, params, queries


@pytest.mark.parametrize("name", MODELS)
def test_one_forward_mode_pass_gives_the_same_score(name) -> None:
    loss, params, queries = setting(name, modules=None, count=1)
    batch = cases.batch()
    model = cases.causal(name)
    scored = fa.compose(fa.per_example_grad, fa.inner_products(queries))(loss, params, batch)["scores"][:, 0]
    direction = {n: q[0] for n, q in queries.items()}
    # The fused head and the attention kernel have no forward mode: the model's own logits and eager attention do.
    import copy

    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    if eager._can_set_experts_implementation():
        eager.set_experts_implementation("eager")
    frozen = {n: p.detach() for n, p in eager.named_parameters() if n not in params}

    def losses(chosen):
        out = []
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            length = int(ids.count_nonzero())
            call = torch.func.functional_call(eager, {**frozen, **chosen}, (ids[None, :length],), {"use_cache": False})
            target = labels[1:length]
            out.append(torch.nn.functional.cross_entropy(call.logits[0, :-1], target, reduction="sum"))
        return torch.stack(out)

    detached = {n: p.detach() for n, p in params.items()}
    expected = jvp(losses, (detached,), (direction,))[1]
    torch.testing.assert_close(scored, expected.nan_to_num(), rtol=1e-5, atol=1e-5 * float(expected.abs().nanmean()))


BEFORE = [(), (fa.adafactor_norm,), (fa.project(4),), (fa.project(4), fa.unit_norm)]
SETTINGS = [{}, {"unit_norm": True}, {"by": "leaf"}, {"by": "leaf", "unit_norm": True}]


@pytest.mark.parametrize(("name", "before", "settings", "count"), crossed(MODELS, BEFORE, SETTINGS, [1, 3]))
def test_what_the_backward_pass_reads_is_the_plain_form(name, before, settings, count) -> None:
    # Key biases have no gradient but rounding, which Adafactor would blow up.
    loss, params, _ = setting(name, exclude=["*.bias"] if fa.adafactor_norm in before and "gpt" in name else ())
    batch = cases.batch()
    prefix = fa.compose(fa.per_example_grad, *before)
    state = prefix.fit(loss, params, [batch])
    arriving = prefix.plain(loss, params, batch, state)
    queries = {
        n: torch.randn(count, *g.shape[1:], generator=torch.Generator().manual_seed(1)) for n, g in arriving.items()
    }
    chain = fa.compose(prefix, fa.inner_products(queries, **settings))
    tail = fa.compose(fa.inner_products(queries, **settings))
    spec = prefix.init(fa.per_example_grad.spec(params))[1]
    state = (*state, *tail.init(spec)[0])
    found, plain = chain(loss, params, batch, state), chain.plain(loss, params, batch, state)
    flat = torch.cat([g.flatten(1) for g in arriving.values()], 1).double()
    q = torch.cat([queries[n].flatten(1) for n in arriving], 1).double()
    norm = flat.norm(dim=1, keepdim=True) if settings.get("unit_norm") else torch.ones(len(flat), 1)
    expected = torch.where(norm > 0, flat @ q.T / norm, 0.0).float()
    scale = float(expected.abs().mean())
    for result in (found, plain):
        total = torch.stack(list(result.values())).sum(0)
        torch.testing.assert_close(total, expected, rtol=2e-4, atol=2e-4 * scale)
    for leaf in plain:
        torch.testing.assert_close(found[leaf], plain[leaf], rtol=2e-4, atol=2e-4 * scale)


def test_a_gradient_of_zeros_scores_zero_and_nan_stays_nan() -> None:
    stage = fa.inner_products({"w": torch.ones(2, 3)}, unit_norm=True)
    chain = fa.compose(stage)
    state, _ = chain.init({"w": fa.Leaf((3,), torch.float32)})
    grads = {"w": torch.tensor([[0.0, 0.0, 0.0], [3.0, 0.0, 4.0], [float("nan"), 0.0, 0.0]])}
    scores = chain.apply(state, grads)["scores"]
    torch.testing.assert_close(scores[:2], torch.tensor([[0.0, 0.0], [1.4, 1.4]]))
    assert scores[2].isnan().all()


@pytest.mark.parametrize("by_id", [False, True])
@pytest.mark.parametrize("tokens", [1, 5, 40])
@pytest.mark.parametrize("count", [0, 1, 4])
def test_contracting_is_forming(count, tokens, by_id) -> None:
    generator = torch.Generator().manual_seed(2)
    queries = torch.randn(count, 7, 6, generator=generator)
    cols = torch.randn(3, tokens, 6, generator=generator)
    rows_ = torch.randn(3, tokens, 7, generator=generator)
    if by_id:
        rows_ = OneHot(
            torch.randint(7, (3, tokens), generator=generator), 7, torch.rand(3, tokens, generator=generator)
        )
    formed = outer(rows_, cols).flatten(1)
    expected = torch.cat([formed @ queries.flatten(1).T, formed.square().sum(1, keepdim=True)], 1)
    gradient_map = InnerProducts(queries, norm=True)
    torch.testing.assert_close(gradient_map.from_factors(rows_, cols), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        replace(gradient_map, norm=False).from_factors(rows_, cols), expected[:, :-1], rtol=1e-4, atol=1e-4
    )


def test_parts_of_tokens_add_up_to_the_example() -> None:
    loss, params, queries = setting("gpt_neox", modules=None)
    batch = cases.batch()
    whole = fa.compose(fa.per_example_grad, fa.inner_products(queries))(loss, params, batch)["scores"]
    tokens = fa.compose(per_token_grad, fa.inner_products(queries))(loss, params, batch)["scores"]
    summed = tokens.unflatten(0, (len(whole), -1)).sum(1)
    torch.testing.assert_close(summed, whole, rtol=1e-4, atol=1e-4 * float(whole.abs().mean()))


def test_self_influence_is_the_squared_norm() -> None:
    loss, params, _ = setting("llama_tied")
    batch = cases.batch()
    grads = vmap(lambda example: torch.func.grad(loss)(params, example))(batch)
    expected = sum(g.flatten(1).square().sum(1) for g in grads.values())
    found = fa.compose(fa.per_example_grad, fa.self_influence)(loss, params, batch)["scores"][:, 0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert rows(loss, params, batch).losses.shape == expected.shape


def test_the_nearest_query_decides() -> None:
    loss, params, queries = setting("gpt2", modules=None)
    batch = cases.batch()
    each = fa.compose(fa.per_example_grad, fa.inner_products(queries))(loss, params, batch)["scores"]
    nearest = fa.compose(fa.per_example_grad, fa.inner_products(queries), fa.max_score)(loss, params, batch)["scores"]
    assert torch.equal(nearest, each.amax(1, keepdim=True))


@pytest.mark.parametrize(
    ("queries", "found"),
    [
        ({"a": torch.ones(2, 3)}, "no query gradient for b"),
        (
            {"a": torch.ones(2, 3), "b": torch.ones(2, 4), "c": torch.ones(2, 1)},
            "a query gradient for c, which is none of",
        ),
        ({"a": torch.ones(2, 3), "b": torch.ones(2, 5)}, r"b of shape \(4,\), found \(5,\)"),
        ({"a": torch.ones(2, 3), "b": torch.ones(1, 4)}, r"equally many queries for every leaf, found \[1, 2\]"),
    ],
)
def test_queries_that_do_not_fit_are_refused(queries, found) -> None:
    spec = {"a": fa.Leaf((3,), torch.float32), "b": fa.Leaf((4,), torch.float32)}
    with pytest.raises(fa.ChainError, match=found):
        fa.compose(fa.inner_products(queries)).init(spec)


@pytest.mark.parametrize("settings", [{}, {"unit_norm": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scores_in_half_precision_are_float32_and_do_not_overflow(dtype, settings) -> None:
    params = {"w": torch.full((40, 30), 0.5, dtype=dtype)}

    def loss(params, example):
        return torch.nn.functional.linear(example["x"], params["w"]).float().sum()

    batch = {"x": torch.full((2, 5, 30), 30.0, dtype=dtype)}
    queries = {"w": torch.ones(2, 40, 30)}
    chain = fa.compose(fa.per_example_grad, fa.inner_products(queries, **settings))
    scores = chain(loss, params, batch)["scores"]
    expected = 150.0 * 1200 / (150.0 * 1200**0.5 if settings else 1.0)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, torch.full((2, 2), expected), rtol=1e-3, atol=0)


@pytest.mark.parametrize("names", [("single", "double"), ("double", "single")])
def test_leaves_of_two_dtypes_add_up_in_the_wider(names) -> None:
    dtypes = {"single": torch.float32, "double": torch.float64}
    grads = {name: torch.full((2, 3), 1 + 2**-30, dtype=dtypes[name]) for name in names}
    stage = fa.inner_products({name: torch.ones(1, 3, dtype=dtypes[name]) for name in names})
    state, spec = stage.init({name: fa.Leaf((3,), dtypes[name]) for name in names})
    scores = stage(state, grads)["scores"]
    assert scores.dtype == spec["scores"].dtype == torch.float64
    torch.testing.assert_close(scores, torch.full((2, 1), 6 + 3 * 2**-30, dtype=torch.float64), rtol=1e-15, atol=0)

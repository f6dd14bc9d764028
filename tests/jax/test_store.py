"""From JAX into stores, searches and scores; and the same network in torch."""

from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("jax", reason="jax is not installed; it comes with the dev extra")
pytest.importorskip("flax", reason="flax is not installed; it comes with the dev extra")
pytest.importorskip("equinox", reason="equinox is not installed; it comes with the dev extra")
import jax
import jax.numpy as jnp

import funcattrib as fa
from funcattrib.chain import state_tree
from funcattrib.errors import FuncattribError
from funcattrib.jax import chunked, per_example_grad
from funcattrib.jax.pytrees import tensors_of
from tests.support import jax_nets as nets

ROWS = 23
STAGES = (fa.adafactor_norm, fa.project(4))


def records(rows: int = ROWS, seed: int = 1) -> list[dict]:
    batch = nets.batch(rows, seed=seed)
    return [{name: np.asarray(leaf[at]) for name, leaf in batch.items()} for at in range(rows)]


def settings(path: Path, **others) -> dict:
    return {"path": path, "dtype": "float32", "rows_per_shard": 10, "quiet": True, **others}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("jax")
    chain = fa.compose(chunked(4), *STAGES)
    fa.collect_gradients((nets.dense, nets.plain(nets.flax()[1])), records(), chain=chain, **settings(folder))
    return folder


@pytest.mark.parametrize("how", ["flax", "lifted_dense"])
def test_a_network_in_torch_and_in_jax_gives_the_same_store(how, tmp_path) -> None:
    """Flax NNX, plain JAX and a torch module; the same names, layouts and weights; Adafactor, then a projection."""
    loss, params = nets.flax() if how == "flax" else (nets.dense, nets.plain(nets.flax()[1]))
    model = nets.TorchNet(tensors_of(params))
    parts = fa.functionalize(model, "all")

    def torch_loss(params, example):
        return (parts.call(params, example["x"]) - example["y"]).square().sum()

    ours = fa.collect_gradients(
        (loss, params), records(), chain=fa.compose(chunked(4), *STAGES), **settings(tmp_path / "jax")
    )
    theirs = fa.collect_gradients(
        (torch_loss, parts.params),
        records(),
        chain=fa.compose(fa.per_example_grad, *STAGES),
        **settings(tmp_path / "torch"),
    )
    assert list(ours.leaves) == list(theirs.leaves) == [f"layers.{n}.{w}" for n in (0, 1) for w in ("bias", "kernel")]
    mine, other = (store.matrix().tensor(0, ROWS) for store in (ours, theirs))
    assert mine.shape == (ROWS, 4 + 16 + 4 + 16)
    error = (mine - other).norm(dim=1) / other.norm(dim=1)
    assert float(error.max()) < 1e-5
    assert ours.manifest.model["fingerprint"] == theirs.manifest.model["fingerprint"]
    np.testing.assert_allclose(ours.examples["loss"][:], theirs.examples["loss"][:], rtol=1e-5)


def test_the_store_holds_what_the_chain_gives(run) -> None:
    params, batch = nets.plain(nets.flax()[1]), nets.batch(ROWS)
    chain, store = fa.compose(per_example_grad, *STAGES), fa.open_store(run)
    assert store.manifest.model["dtype"] == "float32"
    state = chain.fit(nets.dense, params, [batch])
    expected = torch.cat([grad.flatten(1) for grad in chain(nets.dense, params, batch, state).values()], 1)
    torch.testing.assert_close(store.matrix().tensor(0, ROWS), expected, rtol=1e-5, atol=1e-5)
    saved = state_tree.restore(chain.init(per_example_grad.spec(params))[0], store.state())
    found = torch.cat([grad.flatten(1) for grad in chain(nets.dense, params, batch, saved).values()], 1)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("faiss", [None, "Flat"])
def test_search_finds_each_example_as_its_own_nearest(run, faiss) -> None:
    params, batch = nets.plain(nets.flax()[1]), nets.batch(ROWS)
    chain = fa.compose(per_example_grad, *STAGES)
    saved = state_tree.restore(chain.init(per_example_grad.spec(params))[0], fa.open_store(run).state())
    queries = chain(nets.dense, params, jax.tree.map(lambda leaf: leaf[:7], batch), saved)
    config = None if faiss is None else fa.FaissConfig(faiss)
    found = fa.Attributor(run, unit_norm=True, faiss_cfg=config).search(queries, 3)
    assert found.rows[:, 0].tolist() == list(range(7))
    torch.testing.assert_close(found.values[:, 0], torch.ones(7), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "how", [{}, {"unit_norm": True}, {"score": "mean"}, {"granularity": "module"}, {"top_k": 4}], ids=str
)
def test_scores_of_a_stream_are_products_of_stored_rows(run, how, tmp_path) -> None:
    model = (nets.dense, nets.plain(nets.flax()[1]))
    common = settings(tmp_path / "scores", chain=fa.compose(chunked(4), *STAGES))
    scores = fa.score_gradients(model, records(), query_data=records(3, seed=2), **common, **how)
    query = fa.open_store(tmp_path / "scores" / "gradients" / "query").matrix().tensor(0, 3).double()
    rows = fa.open_store(run).matrix().tensor(0, ROWS).double()
    if how.get("unit_norm"):
        rows, query = (part / part.norm(dim=1, keepdim=True) for part in (rows, query))
    expected = rows @ query.T
    expected = expected.mean(1, keepdim=True) if how.get("score") == "mean" else expected
    if "top_k" in how:
        assert scores.topk(4).rows.tolist() == expected.T.topk(4).indices.tolist()
        return
    torch.testing.assert_close(torch.as_tensor(scores[:]).double(), expected, rtol=1e-4, atol=1e-4)


def test_self_influence_and_the_reduced_gradient(run, tmp_path) -> None:
    model = (nets.dense, nets.plain(nets.flax()[1]))
    chain = fa.compose(chunked(4), *STAGES)
    rows = fa.open_store(run).matrix().tensor(0, ROWS).double()
    own = fa.score_gradients(model, records(), score="self", chain=chain, **settings(tmp_path / "self"))
    torch.testing.assert_close(torch.as_tensor(own[:])[:, 0].double(), rows.square().sum(1), rtol=1e-4, atol=1e-4)
    mean = fa.reduce_gradients(model, records(), method="mean", chain=chain, **settings(tmp_path / "mean"))
    torch.testing.assert_close(mean.matrix().tensor(0, 1)[0].double(), rows.mean(0), rtol=1e-4, atol=1e-5)


def test_a_fit_on_its_own_serves_a_later_store(run, tmp_path) -> None:
    model, chain = (nets.dense, nets.plain(nets.flax()[1])), fa.compose(chunked(4), *STAGES)
    fa.fit_chain(model, records(), chain=chain, **settings(tmp_path / "state"))
    few = settings(tmp_path / "few", chain=chain, state=tmp_path / "state")
    store = fa.collect_gradients(model, records()[:5], **few)
    expected = fa.open_store(run).matrix().tensor(0, 5)
    torch.testing.assert_close(store.matrix().tensor(0, 5), expected, rtol=1e-5, atol=1e-5)


def test_what_is_refused(tmp_path) -> None:
    model = (nets.dense, nets.plain(nets.flax()[1]))
    with pytest.raises(FuncattribError, match=r"found .*\nof JAX, begin the chain at funcattrib.jax"):
        fa.collect_gradients(model, records(), **settings(tmp_path / "no chain"))
    with pytest.raises(FuncattribError, match="granularity 'token' requires a chain of per_example_grad, found jax"):
        fa.collect_gradients(
            model,
            records(),
            granularity="token",
            chain=fa.compose(per_example_grad, fa.project(2)),
            **settings(tmp_path / "tokens"),
        )
    with pytest.raises(FuncattribError, match="found int32 at step"):
        fa.collect_gradients(
            (nets.dense, {**model[1], "step": jnp.zeros((), jnp.int32)}),
            records(),
            chain=fa.compose(per_example_grad, fa.project(2)),
            **settings(tmp_path / "integer"),
        )

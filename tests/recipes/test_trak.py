"""TRAK against its formula in dense float64, for a language model and for a loss of one label; what is refused."""

import logging

import numpy as np
import pytest
import torch
import transformers

import funcattrib as fa
from funcattrib.recipes.trak import trak
from tests.support import cases, tiny
from tests.support.saved_runs import records, save_run

TRAIN, QUERY = records((9, 5, 12, 2, 7, 11, 6, 8, 10, 4, 1, 7, 9, 6), 1), records((6, 9, 7), 2)
COMMON = {"rows_per_shard": 4, "token_batch_size": 40, "quiet": True}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return save_run(tmp_path_factory.mktemp("run"))


def margins(model, record):
    """log(p_t / (1 − p_t)) of every token but the first, from its probability."""
    ids = torch.tensor(record["input_ids"])
    p = model(input_ids=ids[None]).logits[0, :-1].softmax(-1).gather(1, ids[1:, None])[:, 0]
    return (p / (1 - p)).log()


def sketches(model, data, names, k, seed, projection):
    rows = []
    for record in data:
        model.zero_grad()
        margins(model, record).sum().backward()
        own = dict(model.named_parameters())
        grads = {n: torch.zeros_like(own[n])[None] if own[n].grad is None else own[n].grad[None] for n in names}
        if projection:
            stage = fa.project(projection, seed=seed)
            spec = {n: fa.Leaf(tuple(g.shape[1:]), torch.float32) for n, g in grads.items()}
            grads = stage(stage.init(spec)[0], grads)
        rows.append(fa.sketch(k, seed=seed)(None, grads)["sketch"][0].detach())
    return torch.stack(rows)


def estimate(ensemble, damping):
    """The formula, from φ of the documents, φ of the queries and p of the documents for each model."""
    products, missing = [], []
    for train, query, p in ensemble:
        gram = train.T @ train
        damped = gram + damping * gram.trace() / len(gram) * torch.eye(len(gram))
        products.append(query @ torch.linalg.inv(damped) @ train.T)
        missing.append(1 - p)
    return (torch.stack(products).mean(0) @ torch.stack(missing).mean(0).diag()).T.numpy()


@pytest.mark.parametrize(("damping", "projection"), [(0.0, 0), (0.2, 3)])
def test_scores_are_those_of_the_formula(damping, projection, run, tmp_path) -> None:
    ensemble = []
    for number, folder in enumerate(run):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
        names = list(fa.causal_lm_loss(model)[1])
        train, query = (sketches(model, data, names, 4, 3 + number, projection) for data in (TRAIN, QUERY))
        with torch.no_grad():
            mean = [float(margins(model, record).mean()) if len(record["input_ids"]) > 1 else 0.0 for record in TRAIN]
        ensemble.append((train, query, torch.tensor(mean, dtype=torch.float64).sigmoid()))
    expected = estimate(ensemble, damping)
    options = {"sketch_dim": 4, "damping": damping, "seed": 3, "projection_dim": projection, **COMMON}
    scores = trak(run, TRAIN, QUERY, path=tmp_path / "out", **options)
    assert scores.shape == (14, 3)
    np.testing.assert_allclose(np.asarray(scores), expected, atol=1e-3 * np.abs(expected).max())
    assert (np.asarray(scores)[10] == 0).all()  # a document without a labelled token
    mean = trak(run, TRAIN, QUERY, path=tmp_path / "mean", score="mean", **options)
    np.testing.assert_allclose(np.asarray(mean)[:, 0], expected.mean(1), atol=1e-3 * np.abs(expected).max())


def test_a_loss_of_one_label(tmp_path) -> None:
    generator = torch.Generator().manual_seed(0)
    x, q = (torch.randn(n, 6, generator=generator) for n in (30, 2))
    w = torch.randn(6, generator=generator)

    def loss(params, example):
        return -(params["w"] * example["x"]).sum()

    def phi(rows):
        return fa.sketch(3, seed=0)(None, {"w": rows.double()})["sketch"]

    expected = estimate([(phi(x), phi(q), (x @ w).double().sigmoid())], 0.0)
    data, queries = ([{"x": row.tolist()} for row in rows] for rows in (x, q))
    scores = trak([(loss, {"w": w})], data, queries, path=tmp_path, sketch_dim=3, quiet=True)
    np.testing.assert_allclose(np.asarray(scores), expected, rtol=1e-4, atol=1e-7)


def test_predicts_what_leaving_an_example_out_does(tmp_path) -> None:
    """One Newton step away, in a logistic regression whose sketch loses nothing: TRAK's own derivation."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(60, 3, generator=generator, dtype=torch.float64)
    y = torch.where(x @ torch.tensor([1.0, -0.5, 0.3]).double() + torch.randn(60, generator=generator) > 0, 1.0, -1.0)
    z = x * y[:, None]

    def fitted(rows):
        w = torch.zeros(3, dtype=torch.float64)
        for _ in range(30):
            p = (rows @ w).sigmoid()
            w = w + torch.linalg.solve(rows.T @ (rows * (p * (1 - p))[:, None]), rows.T @ (1 - p))
        return w

    w, query = fitted(z), z[:4] + 0.1
    left_out = torch.stack([query @ (w - fitted(torch.cat([z[:i], z[i + 1 :]]))) for i in range(60)])

    def loss(params, example):
        return -(params["w"] * example["x"]).sum()

    data, queries = ([{"x": row.tolist()} for row in rows.float()] for rows in (z, query))
    scores = np.asarray(trak([(loss, {"w": w.float()})], data, queries, path=tmp_path, sketch_dim=24, quiet=True))
    for column in range(4):
        assert np.corrcoef(scores[:, column], left_out[:, column])[0, 1] > 0.8


def test_models_in_memory_and_too_wide_a_sketch(tmp_path, caplog) -> None:
    model = cases.causal("llama")
    with caplog.at_level(logging.WARNING):
        twice = trak([model, model], TRAIN, QUERY, path=tmp_path / "two", sketch_dim=16, **COMMON)
    assert "14 documents are too few for a sketch of 16 columns" in caplog.text
    once = trak([model], TRAIN, QUERY, path=tmp_path / "one", sketch_dim=16, **COMMON)
    assert np.isfinite(np.asarray(twice)).all()
    assert not np.allclose(np.asarray(twice), np.asarray(once))  # a second sketch was drawn


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"models": []}, "no model was given"),
        ({"loss": "ce"}, "found ce, sum"),
        ({"loss_reduction": "mean"}, "found log_odds, mean"),
        ({"score": "nearest"}, "found 'nearest'"),
        ({"sketch_dim": 0}, "`sketch_dim` of at least 1, found 0"),
        ({"damping": -1.0}, "`damping` of at least 0, found -1.0"),
        ({"tokenizer": "name"}, "the tokenizer 'name' cannot be loaded"),
    ],
)
def test_what_cannot_be_asked_for(change, found, tmp_path) -> None:
    asked = {"models": [cases.causal("llama")], **change}
    with pytest.raises(fa.FuncattribError, match=found):
        trak(asked.pop("models"), TRAIN, QUERY, path=tmp_path / "out", **COMMON, **asked)
    assert not (tmp_path / "out").exists()


def test_models_that_do_not_fit_are_refused(run, tmp_path) -> None:
    common = {"sketch_dim": 4, **COMMON}
    with pytest.raises(fa.FuncattribError, match=r"one architecture: .* in model 2, and"):
        trak([cases.causal("llama"), cases.causal("gpt2")], TRAIN, QUERY, path=tmp_path / "a", **common)
    with pytest.raises(fa.FuncattribError, match="expected a Hugging Face model"):
        trak([tmp_path], TRAIN, QUERY, path=tmp_path / "b", **common)
    nan = {"w": torch.full((2,), float("nan"))}
    data = [{"x": [1.0, 2.0]}]
    with pytest.raises(fa.FuncattribError, match="are NaN or infinite; check their loss"):
        trak([(lambda p, e: (p["w"] * e["x"]).sum() ** 2, nan)], data, data, path=tmp_path / "c", quiet=True)


def test_the_command(funcattrib, run, tmp_path) -> None:
    texts = tiny.texts(9)
    train = tiny.write_jsonl(tmp_path / "train.jsonl", [{"text": text} for text in texts])
    query = tiny.write_jsonl(tmp_path / "query.jsonl", [{"text": text} for text in texts[2:4]])
    words = ["trak", tmp_path / "out", "--dataset", train, "--query-dataset", query, "--sketch-dim", 4]
    words += [word for folder in run for word in ("--checkpoint", folder)]
    ran = funcattrib(*words)
    assert ran.code == 0, ran.err
    assert f"{tmp_path / 'out'}: scores of 9 examples for 2 queries" in ran.out
    again = funcattrib("trak", tmp_path / "out", "--config", tmp_path / "out" / "config.yaml")
    assert again.code == 0, again.err
    assert again.out == ran.out
    wrong = funcattrib(*words, "--loss", "ce")
    assert wrong.code == 2
    assert "found ce, sum" in wrong.err

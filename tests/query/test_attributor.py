"""Searching a store: with its own queries, with the user's own backward pass, and refusing what does not fit."""

import copy
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import funcattrib as fa
from funcattrib.data import Columns, collate
from funcattrib.query.attributor import Attributor
from funcattrib.report.table import hits_table
from tests.runs.test_collect import build, records
from tests.support import cases, tiny

TEXTS = tiny.texts(30, seed=3)
QUERIES = tiny.texts(5, seed=9)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory):
    """name → the finished store of that model, made once."""
    folder, made = tmp_path_factory.mktemp("runs"), {}

    def run(name: str, **settings: object) -> Path:
        key = f"{name}-{'-'.join(f'{k}={v}' for k, v in sorted(settings.items()))}"
        if key not in made:
            model = cases.causal(name)
            # Matrices and norms. Mamba uses two of its weights in operations without a rule outside vmap.
            left_out = ("embed", "wte", "wpe", "conv1d", "dt_proj")
            names = [n for n, _ in model.named_parameters() if n.endswith("weight")]
            chosen = {"modules": [n for n in names if not any(part in n for part in left_out)]}
            build(folder / key, records(TEXTS), model, normalizer="adafactor", **{**chosen, **settings})
            made[key] = folder / key
        return made[key]

    return run


def attributor(run: Path, name: str = "gpt_neox", **options: object) -> Attributor:
    return Attributor(run, model=cases.causal(name), tokenizer=tiny.make_tokenizer(), **options)


def batch_of(texts: list[str]) -> dict[str, Tensor]:
    tokenizer = tiny.make_tokenizer()
    ids = [tokenizer(text)["input_ids"] for text in texts]
    return collate([{"input_ids": each, "labels": each} for each in ids], pad_id=0)


def summed_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    logits = model(input_ids=batch["input_ids"]).logits[:, :-1].flatten(0, 1)
    return nn.functional.cross_entropy(logits.float(), batch["labels"][:, 1:].flatten(), reduction="sum")


@pytest.mark.parametrize("unit_norm", [False, True])
def test_search_is_the_dense_product(runs, unit_norm: bool) -> None:
    found = attributor(runs("gpt_neox"), unit_norm=unit_norm)
    queries, rows = found.gradients(QUERIES), found.store.matrix().tensor().double()
    scores = queries.double() @ rows.T
    if unit_norm:
        scores = scores / rows.norm(dim=1) / queries.double().norm(dim=1, keepdim=True)
    for reverse in (False, True):
        best = scores.topk(7, largest=not reverse)
        values, indices = found.search(queries, 7, reverse=reverse)
        assert indices.tolist() == best.indices.tolist()
        torch.testing.assert_close(values.double(), best.values, rtol=1e-6, atol=1e-6)
    hits = found.ask(QUERIES, 7, reverse=True)
    assert [[hit.row for hit in each] for each in hits] == indices.tolist()
    assert [hit.rank for hit in hits[0]] == list(range(1, 8))
    assert hits[0][0].text == TEXTS[hits[0][0].row]


@pytest.mark.parametrize(
    ("columns", "shown"),
    [
        (Columns("document"), ("document",)),
        (Columns("tokens", "loss"), ("data.tokens", "data.loss")),
        (Columns("id"), ("data.id",)),
    ],
)
def test_text_of_any_column(columns: Columns, shown: tuple[str, ...], tmp_path: Path) -> None:
    named = (columns.prompt_column, columns.completion_column)
    data = [dict(zip(filter(None, named), (text, " w3 w4"), strict=False)) for text in TEXTS[:4]]
    model, tokenizer = cases.causal("gpt_neox"), tiny.make_tokenizer()
    settings = {"tokenizer": tokenizer, "columns": columns, "quiet": True}
    store = fa.collect_gradients(model, data, path=tmp_path / "run", projection_dim=4, **settings)
    assert store.manifest.text_columns == shown
    assert store.examples.column_names == ["id", *shown, "loss", "tokens"]
    assert all(isinstance(loss, float) and loss > 0 for loss in store.examples["loss"][:])
    assert store.examples["tokens"][:] == [len(tokenizer("".join(row.values()))["input_ids"]) for row in data]
    hits = attributor(tmp_path / "run").ask([TEXTS[0]], 4)[0]
    assert {hit.row: hit.text for hit in hits} == {row: " ".join(each.values()) for row, each in enumerate(data)}
    assert f"{TEXTS[0][:10]}" in hits_table(hits, TEXTS[0])


def test_a_query_is_the_chain_on_it(runs) -> None:
    found = attributor(runs("gpt_neox"))
    torch.testing.assert_close(found.gradients(TEXTS), found.store.matrix().tensor(), rtol=1e-4, atol=1e-4)
    grads = {}
    rows = found.gradients(QUERIES)
    for name, leaf in found.store.leaves.items():
        grads[name] = rows[:, leaf.start : leaf.stop].reshape(-1, *leaf.shape)
    assert found.search(grads, 3).rows.tolist() == found.search(rows, 3).rows.tolist()
    with pytest.raises(fa.FuncattribError, match="compute the query with the store's own chain"):
        found.search(dict(list(grads.items())[1:]), 3)
    with pytest.raises(fa.FuncattribError, match="of shape"):
        found.search({name: grad[:, :1] for name, grad in grads.items()}, 3)
    with pytest.raises(fa.FuncattribError):
        found.search(rows[:, :-1], 3)


def test_the_store_loads_its_own_model(tmp_path: Path, model_folder: Path) -> None:
    fa.collect_gradients(str(model_folder), records(TEXTS), path=tmp_path / "run", quiet=True)
    assert Attributor(tmp_path / "run", unit_norm=True).ask([TEXTS[4]], 1)[0][0].row == 4
    assert Attributor(tmp_path / "run", model=model_folder, unit_norm=True).ask([TEXTS[4]], 1)[0][0].row == 4


@pytest.mark.parametrize("name", cases.EVERY)
@pytest.mark.parametrize("training", [False, True])
def test_trace_reads_the_users_own_backward_pass(runs, name: str, training: bool) -> None:
    model = copy.deepcopy(cases.causal(name)).train(training)
    for module in model.modules():  # the query's gradient is without dropout
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    found, batch = attributor(runs(name), name), batch_of(QUERIES)
    summed_loss(model, batch).backward()
    plain = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    before, own = tiny.state_bytes(model), dict(vars(model))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with found.trace(model, 6) as traced:
            summed_loss(model, batch).backward()
    expected = found.search(found.gradients(QUERIES), 6)
    assert traced.rows.tolist() == expected.rows.tolist()
    torch.testing.assert_close(
        traced.scores, expected.values, rtol=1e-3, atol=1e-4 * float(expected.values.abs().max())
    )
    assert [[hit.row for hit in hits] for hits in traced.hits] == expected.rows.tolist()
    assert vars(model) == own
    assert model.training is training
    assert all(torch.equal(tensor, before[n]) for n, tensor in model.state_dict().items())
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert grads.keys() == plain.keys()
    assert all(torch.equal(grads[n], plain[n]) for n in grads)


def test_trace_of_several_passes_counts_all_examples(runs) -> None:
    model, found = copy.deepcopy(cases.causal("llama")), attributor(runs("llama"), "llama")
    with found.trace(model, 2, reverse=True) as traced:
        for text in QUERIES:
            summed_loss(model, batch_of([text])).backward()
    assert traced.rows.tolist() == found.search(found.gradients(QUERIES), 2, reverse=True).rows.tolist()


def test_trace_runs_hooks_once_and_leaves_the_model_after_an_exception(runs) -> None:
    model, found, calls = copy.deepcopy(cases.causal("gpt2")), attributor(runs("gpt2"), "gpt2"), []
    model.register_forward_pre_hook(lambda *_: calls.append("before"))
    model.register_forward_hook(lambda *_: calls.append("after"))
    own, before = dict(vars(model)), tiny.state_bytes(model)
    with pytest.raises(ZeroDivisionError), found.trace(model, 2):
        summed_loss(model, batch_of(QUERIES)).backward()
        raise ZeroDivisionError
    assert calls == ["before", "after"]
    assert vars(model) == own
    with pytest.raises(IndexError), found.trace(model, 2):
        model(input_ids=torch.tensor([[10_000]]))
    assert vars(model) == own
    assert all(torch.equal(tensor, before[n]) for n, tensor in model.state_dict().items())
    assert all(type(parameter) is nn.Parameter for parameter in model.parameters())


def test_trace_keeps_a_forward_that_was_replaced(runs) -> None:
    model, found = copy.deepcopy(cases.causal("llama")), attributor(runs("llama"), "llama")
    original = model.forward
    model.forward = lambda *args, **kwargs: original(*args, **kwargs)
    replaced = model.forward
    with found.trace(model, 2) as traced:
        summed_loss(model, batch_of(QUERIES)).backward()
    assert model.forward is replaced
    assert traced.rows.tolist() == found.search(found.gradients(QUERIES), 2).rows.tolist()


def test_trace_needs_a_forward_and_a_backward_pass(runs) -> None:
    model, found = copy.deepcopy(cases.causal("llama")), attributor(runs("llama"), "llama")
    with pytest.raises(fa.FuncattribError, match="there was no forward pass"), found.trace(model, 2):
        pass
    with pytest.raises(fa.FuncattribError, match="there was no backward pass"), found.trace(model, 2):
        summed_loss(model, batch_of(QUERIES))


def test_trace_with_gradient_checkpointing(runs) -> None:
    model, found = copy.deepcopy(cases.causal("llama")).train(), attributor(runs("llama"), "llama")
    model.activation_checkpointing_enable({"use_reentrant": False})
    with found.trace(model, 2) as traced:
        summed_loss(model, batch_of(QUERIES)).backward()
    assert traced.rows.tolist() == found.search(found.gradients(QUERIES), 2).rows.tolist()


@pytest.mark.parametrize("unit_norm", [False, True])
def test_faiss_flat_ranks_as_exact(runs, unit_norm: bool) -> None:
    pytest.importorskip("faiss")
    exact = attributor(runs("gpt_neox"), unit_norm=unit_norm)
    index = attributor(runs("gpt_neox"), unit_norm=unit_norm, faiss_cfg=fa.FaissConfig("Flat"))
    queries = exact.gradients(QUERIES)
    for reverse in (False, True):
        a, b = (each.search(queries, 6, reverse=reverse) for each in (exact, index))
        assert a.rows.tolist() == b.rows.tolist()
        torch.testing.assert_close(a.values, b.values, rtol=1e-4, atol=1e-4)
    mapped = attributor(runs("gpt_neox"), faiss_cfg=fa.FaissConfig("IVF1,SQfp16", mmap_index=True))
    assert mapped.ask([TEXTS[2]], 1)[0][0].row == attributor(runs("gpt_neox")).ask([TEXTS[2]], 1)[0][0].row


def test_another_model_is_refused_naming_the_difference(runs) -> None:
    run = runs("gpt_neox")
    with pytest.raises(fa.FuncattribError, match=r"architecture GPTNeoXForCausalLM\), found .* LlamaForCausalLM"):
        Attributor(run, model=cases.causal("llama"), tokenizer=tiny.make_tokenizer()).ask(["w1 w2"])
    narrow = copy.deepcopy(cases.causal("gpt_neox")).bfloat16()
    with pytest.raises(fa.FuncattribError, match=r"dtype float32\), found .* dtype bfloat16"):
        Attributor(run, model=narrow, tokenizer=tiny.make_tokenizer()).ask(["w1 w2"])
    trained = copy.deepcopy(cases.causal("gpt_neox"))
    with torch.no_grad():
        next(trained.parameters()).add_(1e-3)
    found = attributor(run)
    with pytest.raises(fa.FuncattribError, match=r"content [0-9a-f]{12}"), found.trace(trained):
        pass
    found.ask(["w1 w2"])
    with pytest.raises(fa.FuncattribError, match=r"content [0-9a-f]{12}"), found.trace(trained):
        pass


def test_another_chain_is_refused_naming_the_difference(tmp_path: Path) -> None:
    stages = (fa.per_example_grad, fa.project(3, seed=5))
    build(tmp_path / "run", chain=fa.compose(*stages, fa.unit_norm))
    for chain, message in (
        (fa.compose(*stages), r"whose stage 2 is unit_norm\(\), found no stage"),
        (
            fa.compose(fa.per_example_grad, fa.project(3, seed=6), fa.unit_norm),
            r"whose stage 1 is .*seed=5\), found project\(.*seed=6\)",
        ),
    ):
        with pytest.raises(fa.FuncattribError, match=message):
            attributor(tmp_path / "run", chain=chain)
    attributor(tmp_path / "run", chain=fa.compose(*stages, fa.unit_norm)).ask(["w1 w2"])
    double = fa.Transform("double", apply=lambda state, grads: {name: 2 * grad for name, grad in grads.items()})
    build(tmp_path / "own", chain=fa.compose(*stages, double))
    with pytest.raises(
        fa.FuncattribError, match=r"'double' is a transform of the user's.*\n.*Attributor\(run, chain=chain\)"
    ):
        attributor(tmp_path / "own").ask(["w1 w2"])
    attributor(tmp_path / "own", chain=fa.compose(*stages, double)).ask(["w1 w2"])


def test_an_unfinished_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from funcattrib.store import StoreWriter

    put = StoreWriter.put

    def stops_at(last: int):
        def stop(writer: StoreWriter, shard: int, *rest: object) -> None:
            if shard == last:
                raise KeyboardInterrupt
            put(writer, shard, *rest)

        return stop

    for last, rows in ((2, 10), (0, 0)):
        monkeypatch.setattr(StoreWriter, "put", stops_at(last))
        with pytest.raises(KeyboardInterrupt):
            build(tmp_path / f"run{last}")
        with pytest.warns(UserWarning, match=f"unfinished: {rows} of 23 rows"):
            found = attributor(tmp_path / f"run{last}")
        assert len(found.ask(["w1 w2 w3"], 50)[0]) == rows
    (tmp_path / "run2/state.safetensors").unlink()
    with pytest.warns(UserWarning, match="unfinished"):
        found = attributor(tmp_path / "run2")
    with pytest.raises(fa.FuncattribError, match="has no fitted state for its chain; finish building the store first"):
        found.ask(["w1 w2 w3"])


PRECONDITIONED = {
    "cosine": ((fa.precondition(power=-0.5), fa.unit_norm()), True),
    "cosine of rows of any length": ((fa.precondition(power=-0.5),), True),
    "inner product, both sides": ((fa.precondition(power=-0.5),), False),
    "inner product, one side": ((), False),
}


@pytest.mark.parametrize("case", PRECONDITIONED)
def test_a_preconditioned_store_through_faiss_flat_ranks_as_the_dense_formula(case: str, tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    stages, unit_norm = PRECONDITIONED[case]
    model = cases.causal("gpt_neox")
    chain = fa.compose(fa.per_example_grad, fa.project(4), *stages)
    build(tmp_path / "run", records(TEXTS), model, chain=chain, fit_documents=0)
    projected = build(tmp_path / "plain", records(TEXTS), model)
    both = {
        how: attributor(tmp_path / "run", unit_norm=unit_norm, chain=chain, faiss_cfg=faiss)
        for how, faiss in (("exact", None), ("flat", fa.FaissConfig("Flat")))
    }
    asked = attributor(tmp_path / "plain").gradients(QUERIES)

    # In float64 on the projected gradients alone: ⟨a, H⁻¹ b⟩, for the cosine over the lengths √⟨a, H⁻¹ a⟩.
    rows, asked = projected.matrix().tensor().double(), asked.double()
    scores = torch.zeros(len(asked), len(rows), dtype=torch.float64)
    lengths = [torch.zeros(len(each), dtype=torch.float64) for each in (asked, rows)]
    one_side = torch.zeros_like(asked)
    for leaf in projected.leaves.values():
        span = slice(leaf.start, leaf.stop)
        gram = rows[:, span].T @ rows[:, span] / len(rows)
        inverse = torch.linalg.inv(gram + 0.1 * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64))
        one_side[:, span] = asked[:, span] @ inverse
        scores += one_side[:, span] @ rows[:, span].T
        for length, each in zip(lengths, (asked, rows), strict=True):
            length += torch.einsum("nd,de,ne->n", each[:, span], inverse, each[:, span])
    if unit_norm:
        scores = scores / lengths[0].sqrt()[:, None] / lengths[1].sqrt()
    best = scores.topk(7)
    for how, found in both.items():
        queries = one_side.float() if not stages else found.gradients(QUERIES)
        values, indices = found.search(queries, 7)
        assert indices.tolist() == best.indices.tolist(), how
        torch.testing.assert_close(values.double(), best.values, rtol=1e-3, atol=1e-4)

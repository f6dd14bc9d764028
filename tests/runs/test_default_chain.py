"""Settings as chains: what each flag adds, what is refused, and that the store's rows are the chain's."""

import copy

import pytest
import torch
from torch import nn

import funcattrib as fa
from funcattrib.runs.config import GradientConfig
from funcattrib.runs.default_chain import chain_of
from funcattrib.transforms import precondition
from tests.runs.test_collect import build, tokens
from tests.support import cases, tiny

HEADS = fa.AttentionConfig(4, 6, head_dim=1)


def saved_optimizer(model: nn.Module, folder) -> tuple[nn.Module, object]:
    """A model that was trained for two steps, and the file of its optimizer."""
    model = copy.deepcopy(model).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for seed in (1, 2):
        optimizer.zero_grad()
        batch = cases.batch(seed=seed)
        model(input_ids=batch["input_ids"], labels=batch["labels"]).loss.backward()
        optimizer.step()
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    return model.eval(), folder / "optimizer.pt"


def heads_of(model: nn.Module) -> fa.Transform:
    return fa.split_heads(fa.attention_configs(model))


CHAINS = {
    "adam": ({"normalizer": "adam"}, lambda model: (fa.adam_norm(), fa.project(4))),
    "normal": ({"projection_type": "normal", "seed": 3}, lambda model: (fa.project(4, kind="normal", seed=3),)),
    "preconditioned": ({"precondition": "parameter"}, lambda model: (fa.project(4), precondition())),
    "jointly": (
        {"precondition": "all", "damping": 0.3, "normalizer": "adafactor"},
        lambda model: (fa.adafactor_norm(), fa.project(4), precondition(groups="all", damping=0.3)),
    ),
    "sketch": ({"sketch_dim": 32, "projection_dim": 16, "seed": 2}, lambda model: (fa.sketch(32, seed=2),)),
    "sketch of normalised": (
        {"sketch_dim": 32, "projection_dim": 0, "normalizer": "adafactor", "precondition": "parameter"},
        lambda model: (fa.adafactor_norm(), fa.sketch(32), precondition()),
    ),
    "heads": (
        {"split_heads": True, "normalizer": "adafactor"},
        lambda model: (fa.adafactor_norm(), heads_of(model), fa.project(4)),
    ),
    "heads by hand": (
        {"split_attention_modules": ("*attention.dense",), "num_heads": 4, "head_size": 6, "head_dim": 1},
        lambda model: (fa.split_heads({"*attention.dense": HEADS}), fa.project(4)),
    ),
}


@pytest.mark.parametrize("case", CHAINS)
def test_rows_are_those_of_the_chain_that_the_settings_name(case, tmp_path) -> None:
    settings, stages = CHAINS[case]
    model = cases.causal("gpt_neox")
    store = build(tmp_path / "run", model=model, fit_documents=0, **settings)
    chain = fa.compose(fa.per_example_grad, *stages(model))
    assert [stage["name"] for stage in store.manifest.chain] == [stage.name for stage in chain.stages]
    loss, params = fa.causal_lm_loss(model)
    batches = [{k: torch.tensor(v)[None] for k, v in each.items()} for each in tokens()]
    state = chain.fit(loss, params, batches)
    rows = [torch.cat([g.flatten() for g in chain(loss, params, batch, state).values()]) for batch in batches]
    expected, found = torch.stack(rows), store.matrix().tensor()
    assert ((found - expected).norm(dim=1) / expected.norm(dim=1).clamp(min=1e-12)).max() < 1e-3


def test_experts_are_leaves(tmp_path) -> None:
    store = build(
        tmp_path / "run", model=cases.causal("mixtral"), modules=["*experts*"], split_experts=True, quiet=True
    )
    assert len(store.leaves) == 2 * 2 * 4
    assert {leaf.shape for leaf in store.leaves.values()} == {(4, 4)}


@pytest.mark.parametrize("normalizer", ["adafactor", "adam"])
def test_moments_of_an_optimizer_take_the_place_of_a_pass(normalizer, tmp_path) -> None:
    model, file = saved_optimizer(cases.causal("gpt_neox"), tmp_path)
    store = build(tmp_path / "run", model=model, normalizer=normalizer, optimizer_state=file)
    normalize = {"adafactor": fa.adafactor_norm, "adam": fa.adam_norm}[normalizer]
    chain = fa.compose(fa.per_example_grad, normalize(fa.optimizer_state(file, model)), fa.project(4))
    loss, params = fa.causal_lm_loss(model)
    for row in (0, 5):
        batch = {k: torch.tensor(v)[None] for k, v in tokens()[row].items()}
        expected = torch.cat([g.flatten() for g in chain(loss, params, batch).values()])
        torch.testing.assert_close(store.matrix().tensor()[row], expected, rtol=1e-3, atol=1e-3 * expected.abs().max())
    other = torch.load(file, weights_only=True)
    for state in other["state"].values():
        state["exp_avg_sq"] *= 2
    torch.save(other, file)
    with pytest.raises(fa.StoreError, match=r"computed_with\.given"):
        build(tmp_path / "run", model=model, normalizer=normalizer, optimizer_state=file)


def test_heads_of_a_loss_of_ones_own_must_be_named() -> None:
    with pytest.raises(fa.FuncattribError, match="split_attention_modules"):
        chain_of(GradientConfig(split_heads=True), {"w": torch.ones(2, 2)})


REFUSED = {
    "an optimizer's state alone": ({"optimizer_state": "x"}, "`optimizer_state` requires a `normalizer`"),
    "two reductions": ({"sketch_dim": 8, "projection_dim": 4}, "`projection_dim` and `sketch_dim` cannot"),
    "a sketch of heads": ({"sketch_dim": 8, "split_heads": True}, "`sketch_dim` adds up all leaves"),
    "a sketch of experts": ({"sketch_dim": 8, "split_experts": True}, "`sketch_dim` adds up all leaves"),
    "heads twice": (
        {"split_heads": True, "split_attention_modules": "q", "num_heads": 1, "head_size": 1},
        "`split_heads` and `split_attention_modules` cannot be combined",
    ),
    "no head": ({"split_attention_modules": "q", "head_size": 2}, "`split_attention_modules` requires `num_heads`"),
    "no size": ({"split_attention_modules": "q", "num_heads": 2}, "`split_attention_modules` requires `head_size`"),
    "heads of nothing": ({"num_heads": 2}, "`num_heads` requires `split_attention_modules`"),
    "an axis of nothing": ({"head_dim": 0}, "`head_dim` requires `split_attention_modules`"),
    "damping": ({"damping": -0.1}, "`damping` of at least 0, found -0.1"),
    "sketch": ({"sketch_dim": 0}, "`sketch_dim` of at least 1, found 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, tmp_path) -> None:
    settings, message = REFUSED[case]
    with pytest.raises(fa.FuncattribError, match=message):
        build(tmp_path / "run", **{**settings, "projection_dim": settings.get("projection_dim", 16)})
    assert not (tmp_path / "run").exists()


def test_the_command_has_the_flags(funcattrib, tmp_path, model_folder) -> None:
    data = tiny.write_jsonl(tmp_path / "d.jsonl", [{"text": text} for text in tiny.texts(8)])
    words = ("--model", model_folder, "--dataset", data, "--projection-dim", 4, "--normalizer", "adam")
    words = (*words, "--precondition", "all", "--damping", 0.2, "--split_attention_modules", "*attention.dense")
    words = (*words, "--num-heads", 4, "--head_size", 6, "--head-dim", 1)
    assert funcattrib("fit", tmp_path / "fit", *words).code == 0
    assert funcattrib("build", tmp_path / "run", *words, "--state", tmp_path / "fit").code == 0
    chain = fa.open_store(tmp_path / "run").manifest.chain
    assert [stage["name"] for stage in chain] == ["adam_norm", "split_heads", "project", "precondition"]
    assert (chain[-1]["groups"], chain[-1]["damping"]) == ("all", 0.2)
    assert chain[1]["config"]["*attention.dense"]["head_dim"] == 1
    assert funcattrib("build", "--config", tmp_path / "run/config.yaml", tmp_path / "again").code == 0
    assert fa.open_store(tmp_path / "again").manifest.chain == chain
    words_of_query = ("query", "--index", tmp_path / "run", "--text", "w1 w2 w3", "--state")
    assert funcattrib(*words_of_query, tmp_path / "fit").code == 0
    assert funcattrib(*words_of_query, tmp_path / "again").code == 0
    assert funcattrib("fit", tmp_path / "other", *words, "--fit-documents", 3).code == 0
    ran = funcattrib(*words_of_query, tmp_path / "other")
    assert ran.code == 2
    assert f"the state at {tmp_path / 'other'} is not that of {tmp_path / 'run'}: its" in ran.err
    assert "has other numbers; search a store that was built with this --state, or leave it out" in ran.err
    assert funcattrib("fit", tmp_path / "third", *words, "--seed", 3).code == 0
    ran = funcattrib(*words_of_query, tmp_path / "third")
    assert ran.code == 2
    assert f"the state at {tmp_path / 'third'} is of another chain than" in ran.err
    ran = funcattrib("build", tmp_path / "no", *words, "--sketch-dim", 8)
    assert ran.code == 2
    assert "--projection-dim and --sketch-dim cannot be combined" in ran.err

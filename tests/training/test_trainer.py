"""The Trainer, collected from: its bits, and every row against a loop over examples at the weights of its step."""

import copy
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

import funcattrib as fa
from funcattrib import testing as laws
from funcattrib.chain.per_example import spec
from funcattrib.training.capture import collecting
from tests.support import cases, tiny
from tests.support.training import check, examples, gradient, make, train
from tests.training.test_collect import fresh

CHAIN = fa.compose(fa.per_example_grad, fa.project(4))


def callback(path: Path, **settings: object) -> fa.GradientCollectorCallback:
    return fa.GradientCollectorCallback(
        path=path / "run", **{"chain": CHAIN, "dtype": "float32", "track_order": True, **settings}
    )


def same(a, b) -> None:
    assert a.losses
    assert a.losses == b.losses
    assert a.final.keys() == b.final.keys()
    assert all(torch.equal(tensor, b.final[name]) for name, tensor in a.final.items())


SETTINGS = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 2},
    "clipping": {"max_grad_norm": 0.1},
    "no clipping": {"max_grad_norm": 0.0, "lr_scheduler_type": "constant"},
    "label smoothing": {"label_smoothing_factor": 0.1},
    "group by length": {"train_sampling_strategy": "group_by_length"},
    "checkpointing": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
    },
    "checkpointing reentrant": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
        "gradient_accumulation_steps": 2,
    },
    "drop last": {"dataloader_drop_last": True},
    "workers": {"dataloader_num_workers": 1},
    "all columns": {"remove_unused_columns": False, "data": examples().remove_columns("id")},
    "list": {"data": list(examples())},
    "shuffled data": {"data": examples().shuffle(seed=4)},
    "adafactor": {"optim": "adafactor"},
}


SECTION = ("plain", "accumulation", "label smoothing", "checkpointing reentrant", "drop last")
"""Settings that change what a step computes, or which examples it has; the others are slow."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in SECTION else pytest.mark.slow) for name in SETTINGS]
)
def test_rows_and_bits(tmp_path: Path, name: str) -> None:
    settings = SETTINGS[name]
    model = {"model": fresh("llama")} if "checkpointing" in name else {}
    plain = train(tmp_path, None, **{**settings, **({"model": fresh("llama")} if model else {})})
    ran = train(tmp_path, callback(tmp_path), **{**settings, **model})
    same(plain, ran)
    data = settings.get("data", examples())
    for epoch in (0, 1):
        store = fa.open_store(tmp_path / f"run/epoch_{epoch}", verify=True)
        assert len(store) == len(data)
        seen = check(ran, store, CHAIN, data, smoothing=settings.get("label_smoothing_factor", 0.0))
        assert seen == (8 if name == "drop last" else 11)
        order = [(each["step"], each["position"]) for each in store.examples if each["step"] > 0]
        assert len(set(order)) == len(order)
        assert {each["epoch"] for each in store.examples if each["step"] > 0} == {epoch}
        assert store.manifest.extra["visits"] == seen
    assert not (tmp_path / "run/epoch_0/gradients").exists()


@pytest.mark.parametrize("name", cases.swept(["gpt2", "llama_tied", "gemma3", "mixtral"]))
def test_families(tmp_path: Path, name: str) -> None:
    settings = {"num_train_epochs": 1, "gradient_accumulation_steps": 2}
    plain = train(tmp_path, None, model=fresh(name), **settings)
    ran = train(tmp_path, callback(tmp_path), model=fresh(name), **settings)
    same(plain, ran)
    assert check(ran, fa.open_store(tmp_path / "run/epoch_0"), CHAIN) == 11


def test_experts(tmp_path: Path) -> None:
    settings = {"num_train_epochs": 1, "data": [dict(row) for row in examples() if len(row["input_ids"]) > 9]}
    ran = train(tmp_path, callback(tmp_path, modules=["*experts*"]), model=fresh("mixtral"), **settings)
    check(ran, fa.open_store(tmp_path / "run/epoch_0"), CHAIN, settings["data"])
    assert ran.trainer.model.config._experts_implementation != "funcattrib"


@pytest.mark.parametrize("stages", [[fa.project(4)], []], ids=["project", "whole"])
def test_bf16_autocast(tmp_path: Path, stages: list[fa.Transform]) -> None:
    chain = fa.compose(fa.per_example_grad, *stages)
    plain = train(tmp_path, None, bf16=True)
    ran = train(tmp_path, callback(tmp_path, chain=chain), bf16=True)
    same(plain, ran)
    for epoch in (0, 1):  # bfloat16 has 8 bits
        check(ran, fa.open_store(tmp_path / f"run/epoch_{epoch}"), chain, tolerance=6e-2)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("stages", [[], [fa.project(3)], [fa.sketch(16)], [fa.self_influence]])
def test_layers_under_autocast(stages: list[fa.Transform], frozen: bool) -> None:
    """Factors of two types: the input is in float32, the gradient of the output in bfloat16."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv1d(3, 4, 2), torch.nn.LayerNorm(5), torch.nn.Linear(5, 6))
    model.requires_grad_(not frozen)
    x, chain = torch.randn(4, 3, 6, requires_grad=True), fa.compose(fa.per_example_grad, *stages)
    weights = {name: p for name, p in model.named_parameters() if name in ("0.weight", "2.weight")}
    found = []
    for narrow in (False, True):
        with collecting(model, set(weights), chain, chain.init(spec(weights))[0]) as rows:
            with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
                y = model(x)
            y.float().square().sum().backward()
        found.append(rows.grads())
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name].float(), grad, rtol=5e-2, atol=5e-2 * float(grad.abs().max()))


@pytest.mark.slow
def test_evaluation_in_between_and_early_stopping(tmp_path: Path) -> None:
    settings = {
        "num_train_epochs": 6,
        "learning_rate": 0.3,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "named": {"eval_dataset": examples(5, seed=9)},
    }
    stop = transformers.EarlyStoppingCallback(early_stopping_patience=2)
    plain = train(tmp_path / "a", None, extra=[stop], **settings)
    stop = transformers.EarlyStoppingCallback(early_stopping_patience=2)
    ran = train(tmp_path / "b", callback(tmp_path), extra=[stop], **settings)
    same(plain, ran)
    last = ran.trainer.state.global_step
    assert last % 3  # in the middle of an epoch
    stores = sorted((tmp_path / "run").glob("epoch_*"))
    assert len(stores) == -(-last // 3)
    for path in stores:
        check(ran, fa.open_store(path), CHAIN)
    assert fa.open_store(stores[-1]).manifest.extra["unseen"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["one", "several"])
def test_rows_of_the_evaluation_set(tmp_path: Path, kind: str) -> None:
    first, second = examples(5, seed=9), list(examples(7, seed=8))
    data = first if kind == "one" else {"a": first, "b": second}
    settings = {
        "eval_strategy": "steps", "eval_steps": 2, "named": {"eval_dataset": data}, "label_smoothing_factor": 0.1,
        "per_device_eval_batch_size": 3,
    }  # fmt: skip
    for name in ("gpt2", "llama"):  # the first with dropout
        model = (lambda: copy.deepcopy(cases.causal("gpt2"))) if name == "gpt2" else (lambda: fresh("llama"))
        plain = train(tmp_path, None, model=model(), **settings)
        ran = train(tmp_path, callback(tmp_path, evaluate=True, overwrite=True), model=model(), **settings)
        same(plain, ran)
        stores = {"eval": first} if kind == "one" else {"eval_a": first, "eval_b": second}
        for folder, of in stores.items():
            assert sorted(p.name for p in (tmp_path / "run" / folder).iterdir()) == ["step_2", "step_4", "step_6"]
            store = fa.open_store(tmp_path / "run" / folder / "step_2")
            assert len(store) == len(of)
            for row, example in enumerate(of):
                names = list(store.leaves)
                grads = gradient(model().eval(), ran.weights[3], example, names, 0.1, training=False)
                state = CHAIN.init({n: fa.Leaf(tuple(g.shape[1:]), g.dtype) for n, g in grads.items()})[0]
                wanted = fa.Chain(None, CHAIN.stages).apply(state, grads)
                ours = {n: store[n].tensor(row, row + 1).double() for n in names}
                laws.close(ours, {n: wanted[n] for n in names}, 1e-3)


def test_the_sum_over_epochs(tmp_path: Path) -> None:
    train(tmp_path, callback(tmp_path))
    train(tmp_path, callback(tmp_path / "sum", accumulate=True))
    epochs = [fa.open_store(tmp_path / f"run/epoch_{epoch}").matrix().tensor() for epoch in (0, 1)]
    summed = fa.open_store(tmp_path / "sum/run/sum")
    torch.testing.assert_close(summed.matrix().tensor(), epochs[0] + epochs[1])
    assert all(len(each["step"]) == 2 == each["visits"] for each in summed.examples)


def test_some_steps_or_epochs(tmp_path: Path) -> None:
    ran = train(tmp_path, callback(tmp_path, steps={2, 5}, epochs=[1]))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["epoch_1"]
    store = fa.open_store(tmp_path / "run/epoch_1")
    assert check(ran, store, CHAIN) == 4
    assert store.manifest.extra["steps"] == [5, 5]


def test_dtypes_modules_and_a_chain_that_is_not_linear(tmp_path: Path) -> None:
    chain = fa.compose(fa.per_example_grad, fa.project(4), fa.unit_norm)
    for dtype, tolerance in (("float16", 2e-3), ("bfloat16", 1e-2), ("int8", 2e-2)):
        path = tmp_path / dtype
        ran = train(path, callback(path, dtype=dtype, chain=chain, modules=["*mlp*.weight"]), num_train_epochs=1)
        store = fa.open_store(path / "run/epoch_0")
        assert all("mlp" in name for name in store.leaves)
        assert check(ran, store, chain, tolerance=tolerance) == 11


class TokenSum(transformers.Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        loss = outputs.loss * (inputs["labels"][:, 1:] != -100).sum() / 7
        return (loss, outputs) if return_outputs else loss


@pytest.mark.slow
def test_a_loss_of_ones_own(tmp_path: Path) -> None:
    with pytest.raises(fa.FuncattribError, match=r"mean over labelled tokens.*\n.*loss_scale"):
        train(tmp_path, callback(tmp_path), trainer_class=TokenSum)
    for scale in (1 / 7, lambda inputs, items: 1 / 7):
        settings = {"trainer_class": TokenSum, "num_train_epochs": 1, "gradient_accumulation_steps": 2}
        ran = train(tmp_path, callback(tmp_path, loss_scale=scale, overwrite=True), **settings)
        assert check(ran, fa.open_store(tmp_path / "run/epoch_0"), CHAIN) == 11
    with pytest.raises(fa.FuncattribError, match="mean over labelled tokens"):
        doubled = {"compute_loss_func": lambda outputs, labels, num_items_in_batch=None: 2 * outputs.logits.mean()}
        train(tmp_path, callback(tmp_path / "b"), named=doubled)


class Classifier(nn.Module):
    """Anything whose loss is a mean over labels."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 5), nn.Linear(5, 3)])
        self.config = transformers.PretrainedConfig()

    def forward(self, x, labels=None):
        logits = self.layers[1](self.layers[0](x).tanh())
        return {"loss": None if labels is None else nn.functional.cross_entropy(logits, labels), "logits": logits}


def test_a_classifier_of_ones_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    data = [{"x": torch.randn(4), "labels": number % 3} for number in range(6)]
    model = Classifier()
    args = transformers.TrainingArguments(
        str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=6,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    collected = callback(tmp_path, chain=fa.compose(fa.select("*")))
    trainer = transformers.Trainer(model=model, args=args, train_dataset=data, callbacks=[collected])
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    fa.prepare_for_gradient_collection(trainer).train()
    store = fa.open_store(tmp_path / "run/epoch_0")
    for row, each in enumerate(data):
        own = {name: p.clone().requires_grad_() for name, p in weights.items()}
        logits = torch.func.functional_call(model, own, (each["x"][None],))["logits"]
        nn.functional.cross_entropy(logits, torch.tensor([each["labels"]])).backward()
        for name in store.leaves:
            torch.testing.assert_close(store[name].tensor(row, row + 1)[0], own[name].grad, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_resumed_after_a_crash(tmp_path: Path) -> None:
    # Not GPT-NeoX: transformers 5.23 does not load its head again from a Trainer's checkpoint.
    whole = train(tmp_path / "whole", callback(tmp_path / "whole"), model=fresh("llama"), num_train_epochs=3)

    class Crash(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            if state.global_step == 5:
                raise ZeroDivisionError

    settings = {"num_train_epochs": 3, "save_strategy": "steps", "save_steps": 4}
    model = fresh("llama")
    before = dict(vars(model))
    with pytest.raises(ZeroDivisionError):
        train(tmp_path, callback(tmp_path), model=model, extra=[Crash()], **settings)
    assert vars(model).keys() - before.keys() <= {"_is_accelerate_prepared"}  # accelerate's own
    assert all(type(parameter) is nn.Parameter for parameter in model.parameters())
    store = fa.open_store(tmp_path / "run/epoch_1")
    assert store.manifest.extra["steps"] == [4, 5]
    assert store.manifest.extra["partial"]
    with pytest.raises(fa.FuncattribError, match="run has epoch_0 of another training"):
        train(tmp_path, callback(tmp_path))
    resume = str(tmp_path / "out/checkpoint-4")
    again = train(tmp_path, callback(tmp_path), resume, model=fresh("llama"), **settings)
    assert all(torch.equal(t, again.final[n]) for n, t in whole.final.items())
    for epoch in range(3):
        a, b = (fa.open_store(folder / f"run/epoch_{epoch}") for folder in (tmp_path / "whole", tmp_path))
        assert torch.equal(a.matrix().tensor(), b.matrix().tensor())
        assert a.examples[:] == b.examples[:]
        assert not b.manifest.extra["partial"]


def test_the_stores_answer_queries(tmp_path: Path) -> None:
    ran = train(tmp_path, callback(tmp_path))
    found = fa.Attributor(tmp_path / "run/epoch_1", model=ran.trainer.model, unit_norm=True)
    batch = cases.batch()
    with found.trace(ran.trainer.model, 3) as traced:
        ran.trainer.model(**batch).loss.backward()
    assert traced.rows.shape == (4, 3)
    assert traced.hits[0][0].example["id"].startswith("e")
    assert traced.hits[0][0].text == ""  # no column of text, and no tokenizer to make one


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(fa.FuncattribError, match="one GradientCollectorCallback"):
        fa.prepare_for_gradient_collection(make(tmp_path, None).trainer)
    ran = make(tmp_path, None, extra=[callback(tmp_path)])
    with pytest.raises(fa.FuncattribError, match="call prepare_for_gradient_collection"):
        ran.trainer.train()
    fitted = callback(tmp_path, chain=fa.compose(fa.per_example_grad, fa.adafactor_norm))
    with pytest.raises(fa.ChainError, match="adafactor_norm must be fitted"):
        train(tmp_path, fitted)
    ran = make(tmp_path, None, extra=[callback(tmp_path)])
    ran.trainer.args.packing = True
    with pytest.raises(fa.FuncattribError, match="cannot be collected: packing"):
        fa.prepare_for_gradient_collection(ran.trainer)


def test_dropout_and_the_models_own_state_are_untouched(tmp_path: Path) -> None:
    def model() -> nn.Module:
        made = copy.deepcopy(cases.causal("gpt2"))  # with its dropout
        assert any(isinstance(m, nn.Dropout) and m.p for m in made.modules())
        return made

    plain = train(tmp_path, None, model=model())
    trained = model()
    keys = vars(trained).keys() | {"_is_accelerate_prepared"}
    ran = train(tmp_path, callback(tmp_path), model=trained)
    same(plain, ran)
    assert vars(trained).keys() <= keys
    assert tiny.state_bytes(trained).keys() == plain.final.keys()

"""Second moments from saved optimizers: their values, and to which parameter each belongs."""

import copy
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

import funcattrib as fa
from funcattrib import testing as laws
from funcattrib.checkpoints.adam_state import adam_state
from funcattrib.checkpoints.training_run import learning_rates
from funcattrib.models.loading import load_model
from tests.support import cases, tiny


class Small(nn.Module):
    """Two matrices of one shape, a layer norm between them: names and shapes do not tell the order."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.ln = nn.LayerNorm(4)
        self.second = nn.Linear(4, 4)

    def forward(self, x):
        return self.second(self.ln(torch.tanh(self.first(x))))


def trained(make, model=None, steps=3):
    """An optimizer after some steps, and the gradients (steps, *shape) of every parameter."""
    torch.manual_seed(0)
    model = model or Small()
    optimizer = make(model)
    grads = {name: [] for name, p in model.named_parameters() if p.requires_grad}
    for _ in range(steps):
        optimizer.zero_grad()
        (model(torch.randn(5, 4)) * torch.randn(4)).square().sum().backward()
        for name, p in model.named_parameters():
            if p.requires_grad:
                grads[name].append(p.grad.double().clone())
        optimizer.step()
    return model, optimizer, {name: torch.stack(each) for name, each in grads.items() if each}


def saved(optimizer, folder) -> Path:
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    return folder


def adam_moment(grads, beta=0.999):
    v = torch.zeros_like(grads[0])
    for grad in grads:
        v = beta * v + (1 - beta) * grad**2
    return v / (1 - beta ** len(grads))


def decay_names(model):
    return transformers.Trainer.get_decay_parameter_names(None, model)  # it looks at the model alone


def by_trainer(model):
    decay = decay_names(model)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return [{"params": [p for n, p in named if n in decay]}, {"params": [p for n, p in named if n not in decay]}]


def by_rank(model):
    return [
        {"params": [p for p in model.parameters() if p.ndim > 1]},
        {"params": [p for p in model.parameters() if p.ndim < 2]},
    ]


OPTIMIZERS = {
    "adam": lambda model: torch.optim.Adam(model.parameters(), lr=0.1),
    "adamw, Trainer's groups": lambda model: torch.optim.AdamW(by_trainer(model), lr=0.1),
    "adamw, by rank": lambda model: torch.optim.AdamW(by_rank(model), lr=0.1),
    "fused": lambda model: torch.optim.AdamW(by_trainer(model), lr=0.1, fused=True),
    "amsgrad": lambda model: torch.optim.Adam(model.parameters(), lr=0.1, amsgrad=True),
    "names recorded": lambda model: torch.optim.Adam(list(model.named_parameters())[::-1], lr=0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_adam(name, tmp_path) -> None:
    model, optimizer, grads = trained(OPTIMIZERS[name])
    moments = fa.optimizer_state(saved(optimizer, tmp_path), model)
    assert list(moments) == list(grads)
    for parameter, v in moments.items():
        torch.testing.assert_close(v.double(), adam_moment(grads[parameter]), rtol=1e-5, atol=1e-9)


def test_parameters_may_be_given_in_the_place_of_the_model(tmp_path) -> None:
    for make in (OPTIMIZERS["adam"], OPTIMIZERS["adamw, by rank"]):
        model, optimizer, _ = trained(make)
        folder = saved(optimizer, tmp_path)
        laws.same(fa.optimizer_state(folder, dict(model.named_parameters())), fa.optimizer_state(folder, model))


@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt_neox", "qwen3", "olmo2", "llama_tied"])
def test_the_trainer_s_order(name, tmp_path) -> None:
    """A state whose values say to whom they belong."""
    model = cases.causal(name)
    optimizer = torch.optim.AdamW(by_trainer(model))
    for number, p in enumerate(model.parameters()):
        step = torch.tensor(1e9)  # no bias left to correct
        optimizer.state[p] = {"step": step, "exp_avg": p * 0, "exp_avg_sq": torch.full_like(p, number).detach()}
    moments = fa.optimizer_state(saved(optimizer, tmp_path), model)
    assert [(n, float(v.flatten()[0])) for n, v in moments.items()] == [
        (n, float(number)) for number, (n, _) in enumerate(model.named_parameters())
    ]


@pytest.mark.parametrize("optim", ["adamw_torch", "adafactor"])
def test_a_checkpoint_of_the_trainer(optim, tmp_path) -> None:
    pytest.importorskip("accelerate")
    model = copy.deepcopy(cases.causal("gpt2"))
    batch = cases.batch(masked=False)
    data = [{key: value[row] for key, value in batch.items()} for row in range(4)]
    arguments = transformers.TrainingArguments(
        tmp_path, max_steps=2, save_steps=2, optim=optim, report_to=[], use_cpu=True, disable_tqdm=True
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=data)
    trainer.train()
    moments = fa.optimizer_state(tmp_path / "checkpoint-2", cases.causal("gpt2"))
    for name, p in model.named_parameters():
        state = trainer.optimizer.state[p]
        if optim == "adafactor" and p.ndim == 2:
            ours, theirs = moments[name], (state["exp_avg_sq_row"], state["exp_avg_sq_col"])
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        else:
            correction = 1 if optim == "adafactor" else 1 - 0.999**2
            torch.testing.assert_close(moments[name], state["exp_avg_sq"] / correction)
    with pytest.raises(fa.FuncattribError, match=r"give one of its checkpoints, e.g. .*checkpoint-2"):
        fa.optimizer_state(tmp_path, model)


@pytest.mark.parametrize("make", [transformers.Adafactor, torch.optim.Adafactor])
def test_adafactor(make, tmp_path) -> None:
    settings = {"lr": 0.1, "relative_step": False} if make is transformers.Adafactor else {"lr": 0.1}
    model, optimizer, grads = trained(lambda model: make(by_trainer(model), **settings), steps=1)
    moments = fa.optimizer_state(saved(optimizer, tmp_path), model)
    for name, grad in grads.items():
        squares = grad[0].square()
        if squares.ndim == 1:
            torch.testing.assert_close(moments[name].double(), squares, rtol=1e-4, atol=1e-8)
        else:
            r, c = moments[name]
            torch.testing.assert_close(r.double(), squares.mean(1), rtol=1e-4, atol=1e-8)
            torch.testing.assert_close(c.double(), squares.mean(0), rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "hidden from FSDP"])
@pytest.mark.parametrize(
    ("shape", "block"), [((5, 7), 8), ((40, 30), 256), ((3, 5), 2048), ((16, 16), 256), ((60, 70), 2048)]
)
def test_eight_bits(shape, block, wrapped, tmp_path) -> None:
    """A state in bitsandbytes' layout, made by hand: codes of a map of 256, a scale for each block."""
    model = nn.Linear(shape[1], shape[0], bias=True)
    qmap = torch.rand(256).sort().values
    codes = torch.randint(0, 256, shape, dtype=torch.uint8)
    absmax = torch.rand(-(-codes.numel() // block)) + 0.1
    quantised = {"state1": codes, "qmap1": qmap, "absmax1": absmax, "state2": codes, "qmap2": qmap, "absmax2": absmax}
    small = {"state1": torch.rand(shape[0]), "state2": torch.rand(shape[0])}
    states = {
        number: {"step": 4, **({"__bnb_optimizer_quant_state__": own} if wrapped else own)}
        for number, own in enumerate((quantised, small))
    }
    group = {"params": [0, 1], "betas": (0.9, 0.5)}
    torch.save({"state": states, "param_groups": [group]}, tmp_path / "optimizer.pt")
    moments = fa.optimizer_state(tmp_path / "optimizer.pt", model)
    expected = torch.zeros(shape)
    for at in range(codes.numel()):
        expected.view(-1)[at] = qmap[int(codes.view(-1)[at])] * absmax[at // block] / (1 - 0.5**4)
    torch.testing.assert_close(moments["weight"], expected)
    torch.testing.assert_close(moments["bias"], small["state2"] / (1 - 0.5**4))


def test_bitsandbytes(tmp_path) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = nn.Sequential(nn.Linear(4, 64), nn.Linear(64, 65), nn.Linear(65, 4))
    model, optimizer, grads = trained(lambda m: bitsandbytes.optim.AdamW8bit(m.parameters(), lr=0.1), model)
    moments = fa.optimizer_state(saved(optimizer, tmp_path), model)
    for name, grad in grads.items():
        v, size = adam_moment(grad), grad[0].numel()
        tolerance = {"rtol": 1e-4, "atol": 1e-9} if size < 4096 else {"rtol": 0.1, "atol": 0.01 * float(v.max())}
        torch.testing.assert_close(moments[name].double(), v, **tolerance)


def test_they_serve_both_normalisations(tmp_path) -> None:
    model = copy.deepcopy(cases.causal("gpt2"))
    optimizer = torch.optim.AdamW(by_trainer(model), lr=0)
    loss, params = fa.causal_lm_loss(model)
    batch = cases.batch()
    model(input_ids=batch["input_ids"], labels=batch["labels"]).loss.backward()
    squares = {name: p.grad.double().square() for name, p in model.named_parameters()}
    optimizer.step()
    moments = fa.optimizer_state(saved(optimizer, tmp_path), model)
    dense = fa.per_example_grad(loss, params, batch)
    adam = fa.compose(fa.per_example_grad, fa.adam_norm(moments))(loss, params, batch)
    adafactor = fa.compose(fa.per_example_grad, fa.adafactor_norm(moments))(loss, params, batch)
    for name, grad in dense.items():
        v, grad = squares[name], grad.double()
        torch.testing.assert_close(adam[name].double(), grad / (v.sqrt() + 1e-8), rtol=1e-3, atol=1e-2)
        r, c = v.mean(1), v.mean(0)
        expected = grad * (r.mean() / torch.outer(r, c)).sqrt()
        torch.testing.assert_close(adafactor[name].double(), expected, rtol=1e-3, atol=1e-3)


def test_frozen_and_unused_parameters(tmp_path) -> None:
    model = Small()
    model.first.requires_grad_(False)
    model, optimizer, grads = trained(lambda m: torch.optim.Adam([p for p in m.parameters() if p.requires_grad]), model)
    moments = fa.optimizer_state(saved(optimizer, tmp_path), model)
    assert list(moments) == ["ln.weight", "ln.bias", "second.weight", "second.bias"]
    with pytest.raises(
        fa.FuncattribError, match=r"trained 4 of the model's 6 parameters, and their shapes do not show"
    ):
        fa.optimizer_state(tmp_path, Small())
    unused = Small()
    optimizer = torch.optim.Adam(unused.parameters())
    unused.first(torch.ones(4)).sum().backward()
    optimizer.step()
    assert list(fa.optimizer_state(saved(optimizer, tmp_path), unused)) == ["first.weight", "first.bias"]


def test_a_checkpoint_of_several_things(tmp_path) -> None:
    model, optimizer, _ = trained(OPTIMIZERS["adam"])
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 3}, tmp_path / "last.ckpt")
    laws.same(fa.optimizer_state(tmp_path / "last.ckpt", model), fa.optimizer_state(saved(optimizer, tmp_path), model))


@pytest.mark.parametrize("make", ["adam", "adamw, Trainer's groups"])
def test_frozen_parameters_of_a_loaded_model_are_told_by_shapes_that_fit_in_one_way(make, tmp_path) -> None:
    model = cases.causal("llama")
    model = copy.deepcopy(model)
    model.model.embed_tokens.requires_grad_(False)
    model.lm_head.requires_grad_(False)
    optimizer = OPTIMIZERS[make](model)
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if p.requires_grad]
    for p in model.parameters():
        p.grad = None if not p.requires_grad else torch.randn_like(p)
    optimizer.step()
    expected = {name: optimizer.state[p]["exp_avg"] for name, p in model.named_parameters() if p.requires_grad}
    found = adam_state(saved(optimizer, tmp_path), cases.causal("llama"))  # all of whose parameters require grad
    assert list(found) == list(expected)
    laws.same({name: state.first for name, state in found.items()}, expected)


ADAPTERS = {
    "lora": {"target_modules": ["q_proj", "down_proj"]},
    "dora": {"target_modules": ["q_proj"], "use_dora": True},
    "modules to save": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "biases": {"target_modules": ["query_key_value"], "bias": "all"},
}


@pytest.mark.parametrize("grouped", [False, True], ids=["one group", "Trainer's groups"])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_the_optimizer_of_an_adapter(kind, grouped, tmp_path) -> None:
    """Its checkpoint says what was trained: the matrices, magnitudes, copies and biases of its own configuration."""
    peft = pytest.importorskip("peft")
    name = "gpt_neox" if kind == "biases" else "llama"
    base = tiny.save_model(tmp_path / "base", name)
    model = peft.get_peft_model(copy.deepcopy(cases.causal(name)), peft.LoraConfig(r=2, **ADAPTERS[kind]))
    model.peft_config["default"].base_model_name_or_path = str(base)
    trains = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    bare = [p for name, p in trains if name.endswith("bias")]
    groups = [[p for _, p in trains if not any(p is b for b in bare)], bare] if grouped else [[p for _, p in trains]]
    optimizer = torch.optim.AdamW([{"params": group} for group in groups], betas=(0.8, 0.95))
    torch.manual_seed(0)
    for _ in range(2):
        for _, p in trains:
            p.grad = torch.randn_like(p)
        optimizer.step()
    model.save_pretrained(tmp_path / "checkpoint")
    saved(optimizer, tmp_path / "checkpoint")
    loaded = load_model(str(tmp_path / "checkpoint"), device="cpu").model
    assert not loaded.training
    states = adam_state(tmp_path / "checkpoint", loaded)
    assert list(states) == [name for name, _ in trains]
    for name, p in trains:
        kept, found = optimizer.state[p], states[name]
        assert (found.step, found.betas) == (2.0, (0.8, 0.95))
        assert torch.equal(found.first, kept["exp_avg"])
        assert torch.equal(found.second, kept["exp_avg_sq"])
    assert set(fa.causal_lm_loss(loaded)[1]) <= states.keys()  # what LESS asks for


class Other(Small):
    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Linear(4, 5)


class NotATensor:
    pass


def write(value):
    return lambda folder: torch.save(value, folder / "optimizer.pt")


def after(make, steps=3):
    return lambda folder: saved(trained(make, steps=steps)[1], folder)


REFUSED = {
    "nothing there": (lambda folder: None, Small, "optimizer.pt does not exist; give"),
    "another model": (
        after(OPTIMIZERS["adam"]),
        Other,
        r"state of second.weight to have shape \(5, 4\), found \(4, 4\)",
    ),
    "another model, Trainer": (
        after(OPTIMIZERS["adamw, Trainer's groups"]),
        Other,
        r"state of second.weight to have shape",
    ),
    "another model, names": (
        after(OPTIMIZERS["names recorded"]),
        lambda: nn.Linear(4, 4),
        "has a state of second.bias, which the model does not have",
    ),
    "fewer parameters": (after(OPTIMIZERS["adam"]), lambda: nn.Linear(4, 4), "the last parameter is bias"),
    "no step": (after(OPTIMIZERS["adam"], steps=0), Small, "has made no step"),
    "no second moments": (
        after(lambda m: torch.optim.SGD(m.parameters(), momentum=0.9, lr=0.1)),
        Small,
        "second moments of first.weight in .*momentum_buffer",
    ),
    "objects": (write({"state": NotATensor(), "param_groups": []}), Small, "only tensors and numbers are unpickled"),
    "no optimizer": (write({"weight": torch.ones(2)}), Small, "found keys weight"),
    "a tensor": (write(torch.ones(2)), Small, "found a Tensor"),
    "no file of torch": (
        lambda folder: (folder / "optimizer.pt").write_text("no"),
        Small,
        "cannot be read as an optimizer's state_dict",
    ),
}


def edited(group=(), **changes):
    """The state of Adam with entries of the first parameter's state, or of its group, changed."""

    def make(folder):
        state = trained(OPTIMIZERS["adam"])[1].state_dict()
        state["state"][0].update(changes)
        state["param_groups"][0].update(group)
        torch.save(state, folder / "optimizer.pt")

    return make


BAD = torch.full((4, 4), float("nan"))
EIGHT_BITS = {"state1": torch.zeros(4, 4).byte(), "state2": torch.zeros(4, 4).byte(), "absmax2": torch.ones(1)}
DAMAGED = {
    "NaN": (edited(exp_avg_sq=BAD), "first.weight in .* is NaN or infinite; give an earlier checkpoint"),
    "infinity": (edited(exp_avg_sq=-BAD / 0), "first.weight in .* is NaN or infinite"),
    "below zero": (edited(exp_avg_sq=torch.full((4, 4), -1.0)), "first.weight .*a second moment is below zero"),
    "no tensor": (edited(exp_avg_sq=[1.0]), "exp_avg_sq of parameter 0 is a list, no tensor"),
    "a text for a step": (edited(step="three"), "the step of parameter 0 is three"),
    "no step yet": (edited(step=torch.tensor(0.0)), "the step of parameter 0 is 0.0"),
    "a NaN for a step": (edited(step=float("nan")), "the step of parameter 0 is nan"),
    "betas of 1": (edited(group={"betas": (0.9, 1.0)}), r"its betas are \(0.9, 1.0\)"),
    "a number for betas": (edited(group={"betas": 3}), "its betas are 3"),
    "a text for eps": (edited(group={"eps": "small"}), "its eps small"),
    "groups of numbers": (edited(group={"params": 3}), "its groups or states are not what"),
    "states of numbers": (write({"state": {0: 3}, "param_groups": []}), "its groups or states are not what"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_what_is_damaged_is_named(case, tmp_path) -> None:
    make, message = DAMAGED[case]
    make(tmp_path)
    for read in (fa.optimizer_state, adam_state):
        with pytest.raises(fa.FuncattribError, match=message):
            read(tmp_path, Small())


@pytest.mark.parametrize(
    ("first", "message"),
    [
        ({"exp_avg": BAD}, "is NaN or infinite"),
        ({"exp_avg": torch.ones(4)}, "is damaged: it is not Adam's"),
    ],
)
def test_a_first_moment_that_is_damaged(first, message, tmp_path) -> None:
    edited(**first)(tmp_path)
    with pytest.raises(fa.FuncattribError, match=message):
        adam_state(tmp_path, Small())


@pytest.mark.parametrize("qmap", [torch.ones(200), torch.ones(2, 128)])
def test_eight_bits_with_a_map_of_another_size(qmap, tmp_path) -> None:
    edited(**EIGHT_BITS, qmap2=qmap)(tmp_path)
    with pytest.raises(fa.FuncattribError, match=r"the 8-bit state of first\.weight .* is damaged"):
        fa.optimizer_state(tmp_path, Small())
    edited(**EIGHT_BITS)(tmp_path)
    with pytest.raises(fa.FuncattribError, match=r"expected a blockwise state \(absmax2 and qmap2\)"):
        fa.optimizer_state(tmp_path, Small())


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"global_step": "many"}',
        '{"log_history": 3}',
        '{"log_history": [3]}',
        '{"global_step": 3, "log_history": [{"step": 1, "learning_rate": "high"}]}',
        '{"global_step": 3, "log_history": [{"step": 1, "learning_rate": NaN}]}',
        "[" * 100_000,
    ],
)
def test_a_log_that_is_damaged(text, tmp_path) -> None:
    (tmp_path / "trainer_state.json").write_text(text)
    with pytest.raises(fa.FuncattribError, match=r"trainer_state\.json is damaged: .*; give `learning_rates`"):
        learning_rates([tmp_path])
    assert learning_rates([tmp_path], [0.1]) == [0.1]


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, tmp_path) -> None:
    make, model, message = REFUSED[case]
    make(tmp_path)
    with pytest.raises(fa.FuncattribError, match=message):
        fa.optimizer_state(tmp_path, model())

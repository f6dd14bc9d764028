"""Losses by name: kinds and functions of the user's own, from Python and from the command line."""

import copy
import itertools
import logging
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from torch import Tensor, nn

import funcattrib as fa
from funcattrib.data import Columns
from funcattrib.losses.resolve import loss_name, loss_of
from funcattrib.query.attributor import Attributor
from funcattrib.store import GradientStore
from tests.support import cases, tiny

TEXTS = tiny.texts(7)
TARGETS = [0.5, -1.0, 2.0, 0.0, 1.0, 3.0, -2.0]
SMALL = {"projection_dim": 4, "dtype": "float32", "rows_per_shard": 3, "modules": ["*.dense.weight"]}

SOURCE = """
import torch
from funcattrib import functionalize

def margin(model):
    parts = functionalize(model, "all")
    def loss(params, example):
        logits = parts.call(params, input_ids=example["input_ids"][None]).logits[0]
        last = (example["labels"] != -100).sum() - 1
        return (logits[last, 3] - example["target"]).square() * (1 + example["year"])
    return loss

def own_parameters(model):
    parts = functionalize(model, "*.dense.weight")
    def loss(params, example):
        logits = parts.call(params, input_ids=example["input_ids"][None]).logits
        return logits.square().sum()
    return loss, parts.params

def norms(params, example):
    return sum(p.square().sum() for p in params.values()) * example["input_ids"].sum()

def per_token(params, example):
    return example["input_ids"] * norms(params, example)

def number(params, example):
    return 3.0

def three(a, b, c):
    return 0

def nothing(model):
    return None

constant = 5
"""
_numbers = itertools.count()


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of the user's own in the current directory, with a name that no test has imported."""
    name = f"my_loss_{next(_numbers)}"
    (tmp_path / f"{name}.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


def data() -> datasets.Dataset:
    return datasets.Dataset.from_dict({"text": TEXTS, "target": TARGETS, "year": list(range(7))})


def build(path: Path, loss: str | Callable, **settings: object) -> GradientStore:
    settings = {"tokenizer": tiny.make_tokenizer(), "quiet": True, **SMALL, **settings}
    rows = settings.pop("data", data())
    return fa.collect_gradients(cases.causal("gpt_neox"), rows, path=path, loss=loss, **settings)


def margins() -> Tensor:
    """The gradient of ``margin`` in whole logits, projected, one row at a time."""
    model, tokenizer = cases.causal("gpt_neox"), tiny.make_tokenizer()
    params = {n: p for n, p in model.named_parameters() if n.endswith(".dense.weight")}
    rows = []
    for text, target, year in zip(TEXTS, TARGETS, range(7), strict=True):
        ids = torch.tensor(tokenizer(text)["input_ids"])[None]
        loss = (model(input_ids=ids).logits[0, -1, 3] - target) ** 2 * (1 + year)
        rows.append(torch.autograd.grad(loss, list(params.values())))
    chain = fa.compose(fa.per_example_grad, fa.project(4))
    grads = {name: torch.stack(column) for name, column in zip(params, zip(*rows, strict=True), strict=True)}
    projected = chain.apply(chain.init(chain.source.spec(params))[0], grads)
    return torch.cat([grad.flatten(1) for grad in projected.values()], 1)


def test_a_factory_from_the_current_directory(module: str, tmp_path: Path) -> None:
    store = build(tmp_path / "run", f"{module}:margin")
    torch.testing.assert_close(store.matrix().tensor(), margins(), rtol=1e-4, atol=1e-3)
    assert store.manifest.loss["kind"] == f"{module}:margin"
    attributor = Attributor(tmp_path / "run", model=cases.causal("gpt_neox"), tokenizer=tiny.make_tokenizer())
    records = [dict(row) for row in data()]
    torch.testing.assert_close(attributor.gradients(records), store.matrix().tensor(), rtol=1e-4, atol=1e-3)


def test_a_callable(module: str, tmp_path: Path) -> None:
    function = __import__(module).margin
    store = build(tmp_path / "run", function)
    torch.testing.assert_close(store.matrix().tensor(), margins(), rtol=1e-4, atol=1e-3)
    assert store.manifest.loss["kind"] == loss_name(function) == f"{module}:margin"


def define_in_script(monkeypatch: pytest.MonkeyPatch, source: str = SOURCE) -> Callable:
    """``margin`` as the script that runs defines it."""
    names = {"__name__": "__main__"}
    exec(source, names)
    monkeypatch.setattr(sys.modules["__main__"], "margin", names["margin"], raising=False)
    return names["margin"]


def test_a_loss_of_a_script_is_known_by_its_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "funcattrib"):
        store = build(tmp_path / "run", define_in_script(monkeypatch), quiet=False)
    assert caplog.text.count("the loss `margin` is defined in a script (__main__)") == 1

    def ask() -> Tensor:
        attributor = Attributor(tmp_path / "run", model=cases.causal("gpt_neox"), tokenizer=tiny.make_tokenizer())
        return attributor.gradients([dict(row) for row in data()])

    define_in_script(monkeypatch, f"# the same script, run again\n{SOURCE}")
    torch.testing.assert_close(ask(), store.matrix().tensor(), rtol=1e-4, atol=1e-3)
    define_in_script(monkeypatch, SOURCE.replace("logits[last, 3]", "logits[last, 2]"))
    with pytest.raises(
        fa.FuncattribError, match=r"`margin` was defined in a script .* in this one is another\nmove it"
    ):
        ask()
    monkeypatch.delattr(sys.modules["__main__"], "margin")
    with pytest.raises(
        fa.FuncattribError, match=r"loss `margin` was defined in a script \(__main__\)\nmove it to a module"
    ):
        ask()


def test_a_plain_loss_and_a_factory_with_parameters(module: str) -> None:
    model, batch = cases.causal("gpt_neox"), cases.batch((4, 6))
    loss, params = loss_of(model, f"{module}:norms", modules=["*.dense.weight"])
    grads = fa.per_example_grad(loss, params, batch)
    for name, grad in grads.items():
        weights = batch["input_ids"].sum(1).float()[:, None, None]
        torch.testing.assert_close(grad, 2 * weights * dict(model.named_parameters())[name])
    whole = fa.per_example_grad(*loss_of(model, f"{module}:own_parameters"), batch)
    assert list(whole) == [n for n, _ in model.named_parameters() if n.endswith(".dense.weight")]
    some = fa.per_example_grad(*loss_of(model, f"{module}:own_parameters", modules=["*.1.*"]), batch)
    assert list(some) == ["gpt_neox.layers.1.attention.dense.weight"]
    torch.testing.assert_close(some, {name: whole[name] for name in some})


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("per_token", "per_token to return a scalar tensor of floating point for one example, found shape"),
        ("number", "number to return a scalar tensor of floating point for one example, found float"),
        ("three", r"three to take \(params, example\), or a model, found \(a, b, c\)"),
        ("nothing", "nothing\\(model\\) to return a loss or \\(loss, params\\), found NoneType"),
        ("constant", "has no function constant"),
        ("absent", "has no function absent"),
    ],
)
def test_functions_that_are_no_loss(module: str, tmp_path: Path, function: str, message: str) -> None:
    with pytest.raises(fa.FuncattribError, match=message):
        build(tmp_path / "run", f"{module}:{function}")


def test_modules_that_are_not_there_or_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "needs_other.py").write_text("import surely_not_installed\n")
    (tmp_path / "is_broken.py").write_text("1 / 0\n")
    for name, message in (
        ("no_such_module:f", "the module no_such_module of the loss no_such_module:f is neither in .* nor installed"),
        ("needs_other:f", "cannot be imported: ModuleNotFoundError: No module named 'surely_not_installed'"),
        ("is_broken:f", "cannot be imported: ZeroDivisionError"),
        ("kll", "expected `loss` of ce, kl, log_odds or package.module:function, found 'kll'"),
        (":f", "found ':f'"),
    ):
        with pytest.raises(fa.FuncattribError, match=message):
            build(tmp_path / "run", name)


def test_settings_that_mean_nothing_to_a_loss_of_ones_own(module: str, tmp_path: Path) -> None:
    for settings, flag in (
        ({"loss_reduction": "mean"}, "`loss_reduction='mean'`"),
        ({"label_smoothing": 0.1}, "`label_smoothing`"),
        ({"reference_model": cases.causal("llama")}, "`reference_model`"),
    ):
        with pytest.raises(fa.FuncattribError, match=f"{flag}.* cannot be combined with the custom loss"):
            build(tmp_path / "run", f"{module}:margin", **settings)


def test_losses_that_are_not_finite_are_reported_and_marked(
    module: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = datasets.Dataset.from_dict({"text": TEXTS, "target": [0.5, None, 2, 3, 1e30, 3, -2], "year": [0] * 7})
    with caplog.at_level(logging.WARNING, "funcattrib"):
        store = build(tmp_path / "run", f"{module}:margin", data=rows, quiet=False)
    assert "the loss is NaN or infinite in 2 rows: 1, 4" in caplog.text
    lost = torch.tensor([False, True, False, False, True, False, False])
    assert (torch.tensor(store.examples["loss"][:]).isnan() == lost).all()
    assert (store.matrix().tensor().isnan().all(1) == lost).all()
    assert (store.matrix().tensor().isfinite().all(1) == ~lost).all()
    assert store.manifest.nonfinite == 2 * store.width
    attributor = Attributor(tmp_path / "run", model=cases.causal("gpt_neox"), tokenizer=tiny.make_tokenizer())
    found = attributor.search(store.matrix().tensor()[:1], 7)
    assert set(found.rows[0, :5].tolist()) == {0, 2, 3, 5, 6}


def test_smoothing_and_the_mean_reach_the_rows_and_the_manifest(tmp_path: Path) -> None:
    settings = {"loss_reduction": "mean", "label_smoothing": 0.1}
    store = build(tmp_path / "run", "ce", **settings)
    assert {**store.manifest.loss, "loss_reduction": "mean"} == {**store.manifest.loss, **settings}
    model, tokenizer = cases.causal("gpt_neox"), tiny.make_tokenizer()
    for text, loss in zip(TEXTS, store.examples["loss"][:], strict=True):
        ids = torch.tensor(tokenizer(text)["input_ids"])
        z = model(input_ids=ids[None]).logits[0, :-1]
        expected = nn.functional.cross_entropy(z, ids[1:], label_smoothing=0.1)
        assert loss == pytest.approx(expected.item(), rel=1e-5)
    for kind in ("kl", "log_odds"):
        with pytest.raises(fa.FuncattribError, match=r"label_smoothing=0\.1 requires kind='ce'"):
            build(tmp_path / "other", kind, label_smoothing=0.1)


@pytest.fixture(scope="module")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("other") / "llama", "llama")


def test_divergence_by_the_command_line(funcattrib, tmp_path: Path, model_folder: Path, other_model: Path) -> None:
    file = tiny.write_jsonl(tmp_path / "d.jsonl", [{"text": text} for text in TEXTS])
    flags = ("--dataset", file, "--projection-dim", 4, "--dtype", "float32", "--modules", "*.dense.weight")
    words = ("build", tmp_path / "run", "--model", model_folder, *flags, "--loss", "kl", "--loss-reduction", "mean")
    ran = funcattrib(*words)
    assert ran.code == 2
    assert "give one with --reference-model" in ran.err
    assert funcattrib(*words, "--reference-model", other_model).code == 0
    store = fa.open_store(tmp_path / "run")
    settings = {"loss_reduction": "mean", "reference_model": cases.causal("llama"), "data": records()}
    ours = build(tmp_path / "python", "kl", **settings)
    torch.testing.assert_close(store.matrix().tensor(), ours.matrix().tensor())
    assert store.manifest.loss["reference"]["fingerprint"] == ours.manifest.loss["reference"]["fingerprint"]
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["reference_model"] == str(other_model)
    attributor = Attributor(tmp_path / "run")
    torch.testing.assert_close(attributor.gradients(TEXTS), store.matrix().tensor(), rtol=1e-4, atol=1e-5)
    other = funcattrib("build", tmp_path / "ce", "--model", model_folder, *flags, "--reference-model", other_model)
    assert other.code == 2
    assert "a reference model requires kind='kl', found kind='ce'" in other.err


def test_a_reference_that_was_exchanged_is_refused(tmp_path: Path, model_folder: Path) -> None:
    reference = tmp_path / "reference"
    model = copy.deepcopy(cases.causal("llama"))
    model.save_pretrained(reference)
    settings = {"reference_model": str(reference), "data": records()}
    build(tmp_path / "run", "kl", **settings)
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    model.save_pretrained(reference)
    attributor = Attributor(tmp_path / "run", model=cases.causal("gpt_neox"), tokenizer=tiny.make_tokenizer())
    with pytest.raises(fa.FuncattribError, match="is not the one that made the store; restore that one"):
        attributor.gradients(TEXTS)


def test_rewards_and_an_own_loss_by_the_command_line(
    funcattrib, tmp_path: Path, model_folder: Path, module: str
) -> None:
    rows = [dict(row) | {"r": float(i)} for i, row in enumerate(data())]
    file = tiny.write_jsonl(tmp_path / "d.jsonl", rows)
    words = ("--model", model_folder, "--dataset", file, "--projection-dim", 4, "--modules", "*.dense.weight")
    words = (*words, "--dtype", "float32")
    ran = funcattrib("build", tmp_path / "own", *words, "--loss", f"{module}:margin")
    assert ran.code == 0
    torch.testing.assert_close(fa.open_store(tmp_path / "own").matrix().tensor(), margins(), rtol=1e-4, atol=1e-3)
    assert funcattrib("build", tmp_path / "run", *words, "--advantage-column", "r").code == 0
    assert fa.open_store(tmp_path / "run").examples["advantage"][:] == [0, 1, 2, 3, 4, 5, 6]
    columns = Columns(advantage_column="r")
    ours = build(tmp_path / "ours", "ce", data=datasets.Dataset.from_list(rows), columns=columns)
    torch.testing.assert_close(fa.open_store(tmp_path / "run").matrix().tensor(), ours.matrix().tensor())
    both = funcattrib("build", tmp_path / "no", *words, "--advantage-column", "r", "--reward-column", "r")
    assert both.code == 2
    assert "--reward-column ('r') and --advantage-column ('r') cannot be combined" in both.err


def records() -> list[dict]:
    return [{"text": text} for text in TEXTS]


def test_what_a_loss_asks_for_in_vain_is_named() -> None:
    model = cases.causal("llama")

    def asks(params, example):
        return params["lm_head.weight"].sum() * example["reward"]

    rows = [{"input_ids": [3, 4, 5]}]
    common = {"modules": "lm_head.weight", "quiet": True}
    message = "reads 'reward', and the example has"
    with tempfile.TemporaryDirectory() as folder, pytest.raises(fa.FuncattribError, match=message):
        fa.collect_gradients(model, rows, path=f"{folder}/run", loss=asks, **common)

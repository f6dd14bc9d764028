"""The code of a user's function: edits that count, edits that do not, and what cannot be read."""

import functools
import logging
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import funcattrib as fa
from funcattrib.chain.code_hash import code_hash, is_own
from tests.support import cases

SOURCE = """
import torch
from functools import partial
SCALE, NOTE = 2.0, "unused"

class Net:
    def __init__(self, width=3): self.width = width
    def __call__(self, x): return x * self.width

net = Net()
def helper(x): return x * SCALE
def recursive(n): return n if n < 1 else recursive(n - 1)
def made(by):
    def inner(x, power=2):
        return helper(x) ** power + by + recursive(3)
    return inner
weights = torch.ones(3)
def loss(params, example):
    "A docstring."
    total = net(made(1)(params["w"] * example["x"]).sum())  # a comment
    return total + weights.sum() + torch.zeros(()) + len({"a", "b"} & {"b", "c"})
"""


def hashed(source: str, get: str = "loss") -> dict[str, str] | None:
    module = types.ModuleType("users")
    exec(compile(source, "users.py", "exec"), vars(module))
    return code_hash(eval(get, vars(module)), "it")


EDITS = {
    "a constant": ("made(1)", "made(4)"),
    "an operation": ("total + weights", "total - weights"),
    "a helper": ("return x * SCALE", "return x / SCALE"),
    "a global": ("SCALE, NOTE = 2.0", "SCALE, NOTE = 2.5"),
    "a default": ("power=2", "power=3"),
    "a global tensor": ("torch.ones(3)", "torch.zeros(3)"),
    "a method": ("x * self.width", "x + self.width"),
    "an attribute": ("width=3", "width=4"),
    "a torch function": ("torch.zeros(())", "torch.ones(())"),
    "a recursive function": ("n if n < 1", "n if n < 2"),
    "a key": ('["x"]', '["y"]'),
}
FREE = {
    "a comment": ("# a comment", "# another"),
    "a docstring": ("A docstring.", "Another."),
    "a local name": ("total", "amount"),
    "its place": ("import torch\n", "import torch\n\n\n"),
    "a global that is not used": ('"unused"', '"changed"'),
    "its name": ("def loss(", "loss = lambda: None\ndef loss("),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_that_counts(edit: str) -> None:
    assert SOURCE.replace(*EDITS[edit]) != SOURCE
    assert hashed(SOURCE.replace(*EDITS[edit])) != hashed(SOURCE)


@pytest.mark.parametrize("edit", FREE)
def test_an_edit_that_does_not(edit: str) -> None:
    assert hashed(SOURCE) is not None
    assert SOURCE.replace(*FREE[edit]) != SOURCE
    assert hashed(SOURCE.replace(*FREE[edit])) == hashed(SOURCE)


def test_partial_closures_and_methods() -> None:
    assert hashed(SOURCE, "partial(made(1), power=2)") != hashed(SOURCE, "partial(made(1), power=3)")
    assert hashed(SOURCE, "made(1)") != hashed(SOURCE, "made(2)")
    assert hashed(SOURCE, "made(weights)") == hashed(SOURCE, "made(torch.ones(3))")
    assert hashed(SOURCE, "Net(3).__call__") != hashed(SOURCE, "Net(4).__call__")


VALUES: dict[str, tuple[Any, Any]] = {
    "array": (np.arange(3.0), np.arange(3.0) + 1),
    "model": (cases.causal("gpt_neox"), cases.causal("llama")),
    "set": ({"a", "b"}, {"a", "c"}),
    "object": (types.SimpleNamespace(a=1), types.SimpleNamespace(a=2)),
    "generator": (torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)),
    "cached": (functools.cache(lambda x: x), functools.cache(lambda x: -x)),
}


@pytest.mark.parametrize("kind", VALUES)
def test_values_of_many_kinds(kind: str) -> None:
    one, other = (code_hash(lambda p, e, value=value: value, "it") for value in VALUES[kind])
    assert one is not None
    assert one != other
    assert one == code_hash(lambda p, e, value=VALUES[kind][0]: value, "it")


def test_what_cannot_be_read_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    rows = (x for x in [1.0])
    with caplog.at_level(logging.WARNING):
        assert [code_hash(lambda p, e: next(rows), "the loss of this test") for _ in range(2)] == [None, None]
    (message,) = caplog.messages
    assert message.startswith(
        "the code of the loss of this test cannot be compared with that of other runs: it refers to generator"
    )


def test_the_library_s_own_losses_can_be_read() -> None:
    ours, again, other = (fa.causal_lm_loss(cases.causal(name))[0] for name in ("gpt_neox", "gpt_neox", "llama"))
    assert code_hash(ours, "ours") == code_hash(again, "again") != code_hash(other, "other")
    assert code_hash(ours, "ours") is not None


STAGES: dict[str, Callable[[], fa.Transform]] = {
    "adafactor": fa.adafactor_norm,
    "project": lambda: fa.project(3),
    "unit_norm": fa.unit_norm,
    "precondition": lambda: fa.precondition(power=-0.5),
}


@pytest.mark.parametrize("name", STAGES)
def test_stages_of_the_library_have_no_code(name: str) -> None:
    assert STAGES[name]().identity() == STAGES[name]().describe()


def test_whose_code() -> None:
    assert is_own(lambda: 1)
    assert is_own(functools.partial(torch.add, lambda: 1))
    assert not is_own(functools.partial(torch.nn.functional.relu, torch.ones(1)))

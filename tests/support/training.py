"""A tiny training, collected from, and what its rows must be."""

import copy
import random
from functools import lru_cache
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

import funcattrib as fa
from funcattrib import testing as laws
from tests.support import cases
from tests.training.test_collect import fresh


def examples(count: int = 11, seed: int = 0) -> datasets.Dataset:
    """Documents of 3 to 14 tokens whose first tokens have no label."""
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        ids = [draw.randrange(1, cases.VOCABULARY) for _ in range(draw.randint(3, 14))]
        cut = draw.randrange(len(ids) - 1)
        rows.append({"id": f"e{number}", "input_ids": ids, "labels": [-100] * cut + ids[cut:]})
    return datasets.Dataset.from_list(rows)


def collator(features: list[dict[str, Any]]) -> dict[str, Tensor]:
    longest = max(len(each["input_ids"]) for each in features)
    batch = {
        name: torch.tensor([list(each[name]) + [pad] * (longest - len(each[name])) for each in features])
        for name, pad in (("input_ids", 0), ("labels", -100))
    }
    mask = [[1] * len(each["input_ids"]) + [0] * (longest - len(each["input_ids"])) for each in features]
    return {**batch, "attention_mask": torch.tensor(mask)}


class Weights(TrainerCallback):
    """Copies of the weights with which each step was made."""

    def __init__(self) -> None:
        self.at: dict[int, dict[str, Tensor]] = {}

    def on_step_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
        self.at[state.global_step + 1] = copy.deepcopy(model.state_dict())


class Losses(TrainerCallback):
    def __init__(self) -> None:
        self.logged: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        self.logged.extend(value for name, value in logs.items() if "loss" in name and name != "train_loss")


class Ran:
    """One training: the Trainer, its callback (None without), weights by step, losses."""

    def __init__(self, trainer: Trainer, weights: Weights, losses: Losses) -> None:
        self.trainer, self.weights, self.losses = trainer, weights.at, losses.logged
        self.plain = trainer.model

    @property
    def final(self) -> dict[str, Tensor]:
        return self.trainer.model.state_dict()


def make(
    tmp: Path,
    callback: fa.GradientCollectorCallback | None,
    *,
    model: nn.Module | None = None,
    data: Any = None,
    extra: list[TrainerCallback] | None = None,
    trainer_class: type[Trainer] = Trainer,
    named: dict[str, Any] | None = None,
    **settings: Any,
) -> Ran:
    torch.manual_seed(0)
    defaults = {
        "output_dir": str(tmp / "out"),
        "per_device_train_batch_size": 4,
        "num_train_epochs": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
    }
    weights, losses = Weights(), Losses()
    trainer = trainer_class(
        model=model if model is not None else fresh(),
        args=TrainingArguments(**{**defaults, **settings}),
        train_dataset=data if data is not None else examples(),
        data_collator=collator,
        callbacks=[weights, losses, *([callback] if callback else []), *(extra or [])],
        **(named or {}),
    )
    trainer.remove_callback(transformers.PrinterCallback)
    if callback is not None:
        assert fa.prepare_for_gradient_collection(trainer) is trainer
    return Ran(trainer, weights, losses)


def train(tmp: Path, callback: fa.GradientCollectorCallback | None, resume: Any = None, **settings: Any) -> Ran:
    ran = make(tmp, callback, **settings)
    ran.trainer.train(resume_from_checkpoint=resume)
    return ran


def own_loss(model: nn.Module, example: dict[str, Any], smoothing: float = 0.0) -> Tensor:
    """An example's own loss, summed over its labelled tokens."""
    logits = model(input_ids=torch.tensor([list(example["input_ids"])])).logits[0, :-1]
    target = torch.tensor(list(example["labels"])[1:])
    return nn.functional.cross_entropy(logits, target, reduction="sum", label_smoothing=smoothing)


@lru_cache(maxsize=2)
def in_float64(model: nn.Module, training: bool) -> nn.Module:
    """A copy in float64 that computes as plainly as it can."""
    double = copy.deepcopy(model).train(training).double()
    if hasattr(double, "gradient_checkpointing_disable"):
        double.activation_checkpointing_disable()
    if hasattr(double, "_can_set_experts_implementation") and double._can_set_experts_implementation():
        double.set_experts_implementation("eager")
    return double


def gradient(
    model: nn.Module, weights: dict[str, Tensor], example: Any, names: list[str], smoothing: float = 0.0,
    training: bool = True,
) -> dict[str, Tensor]:  # fmt: skip
    """Name → (1, *shape), in float64, by one plain backward pass."""
    double = in_float64(model, training)
    double.load_state_dict(weights)
    double.zero_grad()
    own_loss(double, example, smoothing).backward()
    return {name: parameter.grad[None] for name, parameter in double.named_parameters() if name in names}


def check(ran: Ran, store: Any, chain: fa.Chain, data: Any = None, tolerance: float = 1e-3, smoothing: float = 0.0):
    """Every row is the chain's gradient of its example's own loss at the weights of the step it was trained in."""
    data = data if data is not None else examples()
    names = list(store.leaves)
    seen = 0
    for row, told in enumerate(store.examples):
        values = {name: store[name].tensor(row, row + 1) for name in names}
        if told["step"] < 0:
            assert all(not value.any() for value in values.values())
            continue
        seen += 1
        grads = gradient(ran.plain, ran.weights[told["step"]], data[row], names, smoothing)
        state = chain.init({n: fa.Leaf(tuple(g.shape[1:]), g.dtype) for n, g in grads.items()})[0]
        wanted = fa.Chain(None, chain.stages).apply(state, grads)
        laws.close({n: v.double() for n, v in values.items()}, {n: wanted[n] for n in names}, tolerance)
        assert told["tokens"] == sum(label != -100 for label in data[row]["labels"][1:])
    return seen

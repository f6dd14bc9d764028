"""Adapters and TRL's Trainer: the same laws."""

from pathlib import Path

import datasets
import pytest
import torch

import funcattrib as fa
from tests.support import tiny
from tests.support.training import check, train
from tests.training.test_collect import fresh
from tests.training.test_trainer import CHAIN, callback, same

peft = pytest.importorskip("peft")
trl = pytest.importorskip("trl")


def adapted(name: str = "llama") -> torch.nn.Module:
    model = fresh(name)
    torch.manual_seed(1)
    config = peft.LoraConfig(r=3, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_lora(tmp_path: Path, checkpointing: bool) -> None:
    settings = {"activation_checkpointing": checkpointing, "gradient_accumulation_steps": 2}
    plain = train(tmp_path, None, model=adapted(), **settings)
    ran = train(tmp_path, callback(tmp_path), model=adapted(), **settings)
    same(plain, ran)
    store = fa.open_store(tmp_path / "run/epoch_1")
    assert len(store.leaves) == 8
    assert all("lora_" in name for name in store.leaves)
    assert check(ran, store, CHAIN) == 11


def sft(tmp: Path, collected: fa.GradientCollectorCallback | None, **settings: object):
    torch.manual_seed(0)
    texts = tiny.texts(9, seed=2)
    args = trl.SFTConfig(
        **{
            "output_dir": str(tmp / "out"), "per_device_train_batch_size": 4, "num_train_epochs": 1, "report_to": [],
            "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "bf16": False, "logging_steps": 1,
            "gradient_checkpointing": False, "dataset_num_proc": None, **settings,
        }
    )  # fmt: skip
    return trl.SFTTrainer(
        model=fresh("llama"),
        args=args,
        train_dataset=datasets.Dataset.from_dict({"text": texts}),
        processing_class=tiny.make_tokenizer(),
        callbacks=[collected] if collected else [],
    )


@pytest.mark.parametrize("settings", [{}, {"gradient_accumulation_steps": 2, "max_grad_norm": 0.2}])
def test_sft(tmp_path: Path, settings: dict) -> None:
    from tests.support.training import Losses, Ran, Weights

    runs = []
    for collected in (None, callback(tmp_path)):
        trainer, weights, losses = sft(tmp_path, collected, **settings), Weights(), Losses()
        trainer.add_callback(weights), trainer.add_callback(losses)
        if collected:
            fa.prepare_for_gradient_collection(trainer)
        data = trainer.train_dataset
        trainer.train()
        runs.append(Ran(trainer, weights, losses))
        runs[-1].plain = fresh("llama")  # TRL has put a forward of its own into the one that was trained
    same(*runs)
    assert check(runs[1], fa.open_store(tmp_path / "run/epoch_0"), CHAIN, data) == 9
    assert fa.open_store(tmp_path / "run/epoch_0").examples[0]["text"]


@pytest.mark.parametrize("settings", [{"packing": True, "max_length": 16}, {"padding_free": True, "max_length": None}])
def test_sft_with_joined_examples_is_refused(tmp_path: Path, settings: dict) -> None:
    try:
        trainer = sft(tmp_path, callback(tmp_path), **settings)
    except (ImportError, ValueError) as error:  # TRL itself may ask for an attention that is not here
        pytest.skip(str(error))
    with pytest.raises(fa.FuncattribError, match="whose gradients cannot be separated"):
        fa.prepare_for_gradient_collection(trainer)

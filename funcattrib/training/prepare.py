"""Preparation of a Trainer: its training examples are numbered, and its steps go through the callback."""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from torch import Tensor

from funcattrib.errors import FuncattribError
from funcattrib.training.callback import GradientCollectorCallback
from funcattrib.training.row_ids import ROW, Collate, number

AnyTrainer = TypeVar("AnyTrainer")


def prepare_for_gradient_collection(trainer: AnyTrainer) -> AnyTrainer:
    """Return the same Trainer, from which its ``GradientCollectorCallback`` collects.

    What it computes stays the same to the bit: the same batches in the same order, the same losses, the same weights.

    Raises:
        FuncattribError: no such callback among its callbacks; packing; a training set that is a stream; FSDP,
            DeepSpeed or several GPUs in one process.

    Example:
        >>> import tempfile
        >>> from datasets import Dataset
        >>> from transformers import GPTNeoXConfig, GPTNeoXForCausalLM
        >>> from transformers import Trainer, TrainingArguments, default_data_collator
        >>> from funcattrib.store import open_store
        >>> size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        >>> model = GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=10, max_position_embeddings=8, **size))
        >>> data = Dataset.from_list([{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}] * 4)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     trainer = Trainer(
        ...         model=model,
        ...         args=TrainingArguments(f"{folder}/out", num_train_epochs=1, report_to=[], disable_tqdm=True),
        ...         train_dataset=data,
        ...         data_collator=default_data_collator,
        ...         callbacks=[GradientCollectorCallback(f"{folder}/run", projection_dim=2)],
        ...     )
        ...     _ = prepare_for_gradient_collection(trainer).train()
        ...     open_store(f"{folder}/run/epoch_0").matrix().shape
        {'train_runtime': ...}
        (4, 16)
    """
    _prepare(trainer)
    return trainer


def _prepare(trainer: Any) -> None:
    callbacks = [each for each in trainer.callback_handler.callbacks if isinstance(each, GradientCollectorCallback)]
    if len(callbacks) != 1:
        raise FuncattribError(
            f"expected one GradientCollectorCallback among the Trainer's callbacks, found {len(callbacks)}; "
            "write Trainer(…, callbacks=[GradientCollectorCallback(path)])"
        )
    _refuse(trainer)
    callback, numbered = callbacks[0], number(trainer.train_dataset)
    callback.attach(trainer)
    trainer.train_dataset = numbered
    trainer.data_collator = Collate(trainer.data_collator)
    trainer._set_signature_columns_if_needed()
    trainer._signature_columns.append(ROW)
    trainer.training_step = partial(_training_step, callback, trainer.training_step)
    trainer.compute_loss = partial(callback.compute_loss, trainer.compute_loss)
    trainer.evaluate = partial(_evaluate, callback, trainer.evaluate)
    trainer.train = partial(_train, callback, trainer.train)


def _training_step(
    callback: GradientCollectorCallback,
    original: Callable[..., Tensor],
    model: Any,
    inputs: Any,
    *rest: Any,
    **named: Any,
) -> Tensor:
    rows = inputs.pop(ROW, None)
    return callback.training_step(original, None if rows is None else rows.cpu(), model, inputs, *rest, **named)


def _evaluate(
    callback: GradientCollectorCallback,
    original: Callable[..., Any],
    eval_dataset: Any = None,
    *given: Any,
    **named: Any,
) -> Any:
    metrics = original(eval_dataset, *given, **named)
    callback.evaluated(eval_dataset, named.get("metric_key_prefix", "eval"))
    return metrics


def _train(callback: GradientCollectorCallback, original: Callable[..., Any], *given: Any, **named: Any) -> Any:
    try:
        return original(*given, **named)
    except BaseException:
        callback.broken_off()
        raise


def _refuse(trainer: Any) -> None:
    args = trainer.args
    wrong = None
    if getattr(args, "packing", False):
        wrong = "packing joins parts of several examples into one row, whose gradients cannot be separated"
    elif getattr(args, "padding_free", False):
        wrong = "padding_free joins examples into one row, whose gradients cannot be separated"
    elif trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        wrong = "with FSDP or DeepSpeed no process has whole weights"
    elif args.n_gpu > 1:
        wrong = "the Trainer uses several GPUs in one process; start one process per GPU with torchrun"
    if wrong is not None:
        raise FuncattribError(
            f"gradients of this Trainer cannot be collected: {wrong}\nswitch that off, or collect after training"
        )

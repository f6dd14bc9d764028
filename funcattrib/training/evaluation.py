"""Rows of an evaluation set at the weights it is evaluated at: in a separate forward and backward pass.

The loss is the examples' own, summed over labelled tokens, with dropout off. Neither gradients of weights nor random
numbers are touched, so that the training goes on as it would.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor

from funcattrib.errors import FuncattribError
from funcattrib.kernels.safe_norm import as_rows
from funcattrib.store import Manifest, create_store
from funcattrib.training import loss_scale as losses
from funcattrib.training.capture import Reader, lifted
from funcattrib.training.metadata import data_identity, metadata_of, text_columns


def evaluation_store(
    folder: Path, trainer: Any, read: Reader, manifest: Manifest, state: dict[str, Tensor], examples: Any
) -> None:
    """Store an evaluation set's rows, in its order; every process computes them, the first one writes."""
    manifest = replace(
        manifest,
        rows=len(examples),
        data=data_identity(examples),
        rows_per_shard=max(1, min(manifest.rows_per_shard, len(examples))),
        text_columns=text_columns(examples, trainer.processing_class),
        extra={"step": trainer.state.global_step},
    )
    read_metadata = metadata_of(examples, trainer.processing_class)
    rows = _batches(trainer, read, examples)
    if trainer.args.process_index:
        for _ in rows:
            pass
        return
    waiting = torch.empty(0, manifest.width)
    with create_store(folder, manifest, overwrite=True) as writer:
        if state:
            writer.save_state(state)
        for shard in writer.pending:
            span, parts = writer.shard_range(shard), [waiting]
            while sum(map(len, parts)) < len(span):
                parts.append(next(rows))
            whole = torch.cat(parts)
            whole, waiting = whole[: len(span)].clone(), whole[len(span) :]
            writer.put(shard, whole, read_metadata(span))
        writer.finish()


def _batches(trainer: Any, read: Reader, examples: Any) -> Iterator[Tensor]:
    """Yield rows (B, D) on the CPU, batch by batch."""
    collator, model, size = trainer.data_collator, trainer.model, trainer.args.eval_batch_size
    if isinstance(examples, datasets.Dataset):
        examples = trainer._remove_unused_columns(examples)
    else:
        collator = trainer._get_collator_with_removed_columns(collator)
    smoothing = trainer.label_smoother.epsilon if trainer.label_smoother is not None else 0.0
    for start in range(0, len(examples), size):
        batch = collator([examples[row] for row in range(start, min(start + size, len(examples)))])
        inputs = trainer._prepare_inputs(batch)
        target = losses.targets(trainer, inputs)
        given = {name: value for name, value in inputs.items() if name not in ("labels", "shift_labels")}
        was_training = model.training
        model.eval()
        try:
            with torch.random.fork_rng(devices=[]), torch.enable_grad(), lifted(model, read) as collected:
                total = losses.summed(model(**given), target, smoothing)
                if total is None:
                    raise FuncattribError(
                        "the evaluation has no logits or no labels to compute a loss from; leave evaluate off"
                    )
                probes = list(collected.passes[0].probes.values())
                found = torch.autograd.grad(total, probes, allow_unused=True, materialize_grads=True)
                for probe, gradient in zip(probes, found, strict=True):
                    probe.grad = gradient
                grads = collected.grads()
        finally:
            model.train(was_training)
        yield torch.cat([as_rows(grad).float() for grad in grads.values()], 1).cpu()

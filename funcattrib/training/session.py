"""One training: the Trainer's own steps with lifted parameters beneath them, and their rows into a journal.

The Trainer's ``training_step`` and ``compute_loss`` run as they are, inside a block in which the model's forward has
lifted leaves. Outside it (optimizer, checkpoints, evaluation) nothing is different.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from funcattrib.errors import FuncattribError
from funcattrib.kernels.safe_norm import as_rows
from funcattrib.training import loss_scale as losses
from funcattrib.training.capture import Collected, Reader, lifted
from funcattrib.training.optimizer_weighting import SavedParts, save_factors, saved_coordinates, weighed
from funcattrib.types import Grads, Spec

Write = Callable[[Tensor, Mapping[str, list[Any]], int], None]
"""Takes rows (B, D) on the CPU, the metadata of each, and the step."""


class Weighing(NamedTuple):
    """Weighting by the optimizer: rows normalised by its second moments, scaled by its learning rates."""

    moments: bool
    rates: bool


class Waiting(NamedTuple):
    """A batch whose rows are read after the optimizer's step."""

    parts: SavedParts
    scale: Tensor
    metadata: Mapping[str, list[Any]]


class Session:
    """A run of the Trainer's steps; ``write`` receives the rows."""

    def __init__(
        self,
        trainer: Any,
        model: nn.Module,
        read: Reader,
        spec: Spec,
        weighing: Weighing,
        loss_scale: Any,
        write: Write,
    ) -> None:
        self._trainer, self._model, self._read, self._spec, self._weighing = trainer, model, read, spec, weighing
        self._loss_scale, self._write = loss_scale, write
        self._checked = loss_scale is not None
        self._waiting: list[Waiting] = []
        self._step, self._position = -1, 0
        # Of the batch in hand: c, the gradient that the loss received, its target, and the sum to check it with.
        self._scale: Tensor | None = None
        self._received: Tensor | None = None
        self._target: Tensor | None = None
        self._total: Tensor | None = None

    def training_step(
        self, original: Callable[..., Tensor], rows: Tensor, epoch: int, *given: Any, **named: Any
    ) -> Tensor:
        """Call the Trainer's own step on a batch of the examples ``rows``."""
        self._scale = self._received = self._target = self._total = None
        read = self._read
        parts: SavedParts = {}
        if self._weighing.moments:
            readouts, parts = save_factors(read.readouts)
            read = read._replace(readouts=readouts)
        elif self._weighing.rates:
            read = read._replace(readouts=self._weighed())
        seen = (lambda output: None) if self._checked else self._sum
        with lifted(self._model, read, seen=seen) as collected:
            result = original(*given, **named)
        if self._scale is None or self._received is None:
            raise FuncattribError(
                "the Trainer's training step did not call compute_loss and backward, so its gradients cannot be read"
            )
        scale = self._received * self._scale.to(self._received.device)
        metadata = self._metadata(rows, epoch, scale)
        self._same_rows(collected, len(rows))
        if self._weighing.moments:
            self._waiting.append(Waiting(parts, scale, metadata))
        else:
            self._hand_over(collected.grads(scale), metadata)
        return result

    def compute_loss(
        self, original: Callable[..., Any], model: nn.Module, inputs: Any, *given: Any, **named: Any
    ) -> Any:
        """Call the Trainer's own loss, and observe it."""
        self._target = losses.targets(self._trainer, inputs)
        names = ("return_outputs", "num_items_in_batch")
        items = {**dict(zip(names, given, strict=False)), **named}.get("num_items_in_batch")
        if self._loss_scale is not None:
            self._scale = losses.own_scale(self._loss_scale, inputs, items)
        else:
            self._scale = losses.token_scale(self._trainer, self._target, items)
        result = original(model, inputs, *given, **named)
        loss = result[0] if isinstance(result, tuple) else result
        if not self._checked:
            losses.check(loss, self._total, self._scale)
            self._checked = True
        loss.register_hook(self._receive)
        return result

    def after_optimizer_step(self) -> None:
        """Read what waits for the optimizer's second moments."""
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        readouts = self._weighed()
        for batch in waiting:
            coordinates = saved_coordinates(readouts, batch.parts, len(batch.metadata["row"]))
            grads = {name: value / batch.scale for name, value in coordinates.items()}
            self._hand_over(self._read.rest.apply(self._read.state, grads), batch.metadata)

    def _weighed(self) -> Mapping[str, Any]:
        moments, rates = self._weighing
        return weighed(
            self._read.readouts, self._spec, self._trainer.optimizer, self._model, moments=moments, rates=rates
        )

    def _receive(self, gradient: Tensor) -> None:
        self._received = gradient.detach().float()

    def _sum(self, output: Any) -> None:
        smoother = self._trainer.label_smoother
        with torch.no_grad():
            self._total = losses.summed(output, self._target, smoother.epsilon if smoother is not None else 0.0)

    def _same_rows(self, collected: Collected, count: int) -> None:
        probes = next(iter(collected.passes), None)
        found = 0 if probes is None else len(next(iter(probes.probes.values())))
        if len(collected.passes) != 1 or found != count:
            raise FuncattribError(
                f"expected one forward pass over {count} rows of the data set in a step, found {len(collected.passes)} "
                f"over {found}: packed or padding-free batches have no gradient per example\ntrain without packing"
            )

    def _metadata(self, rows: Tensor, epoch: int, scale: Tensor) -> dict[str, list[Any]]:
        step = self._trainer.state.global_step + 1
        if step != self._step:
            self._step, self._position = step, 0
        count = len(rows)
        first, self._position = self._position, self._position + count
        target = self._target
        tokens = [0] * count if target is None else (target != -100).reshape(len(target), -1).sum(1).tolist()
        return {
            "row": rows.tolist(),
            "step": [step] * count,
            "epoch": [epoch] * count,
            "position": list(range(first, first + count)),
            "rank": [self._trainer.args.process_index] * count,
            "tokens": tokens,
            "loss_scale": [float(scale)] * count,
        }

    def _hand_over(self, grads: Grads, metadata: Mapping[str, list[Any]]) -> None:
        flat = torch.cat([as_rows(grad).float() for grad in grads.values()], 1)
        self._write(flat.cpu(), metadata, metadata["step"][0])

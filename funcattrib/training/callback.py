"""``GradientCollectorCallback``: every example's gradient as it was when the model learned from it.

    callback = GradientCollectorCallback(path="runs/example", track_order=True)
    trainer = prepare_for_gradient_collection(Trainer(model=…, args=…, train_dataset=…, callbacks=[callback]))
    trainer.train()

leaves `runs/example/epoch_0`, `epoch_1`, …: gradient stores with a row an example, in the data set's order.
"""

import os
import shutil
from collections.abc import Container, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import Tensor
from transformers import TrainerCallback

from funcattrib.chain import state_tree
from funcattrib.chain.chain import Chain, compose
from funcattrib.chain.per_example import per_example_grad, spec
from funcattrib.chain.transform import State
from funcattrib.errors import FuncattribError
from funcattrib.models.identity import model_identity
from funcattrib.store import Manifest, lay_out, read_manifest
from funcattrib.store.create import PARTS
from funcattrib.training.assemble import settle
from funcattrib.training.capture import Reader, reader
from funcattrib.training.evaluation import evaluation_store
from funcattrib.training.journal import Journal
from funcattrib.training.loop import trained
from funcattrib.training.loss_scale import LossScale
from funcattrib.training.metadata import data_identity, metadata_of, text_columns
from funcattrib.training.recover import save_plan
from funcattrib.training.session import Session, Weighing
from funcattrib.transforms import project

_SHARD_ROWS = 1024
_SHARD_BYTES = 64 << 20


class Begun(NamedTuple):
    """The settings of a training, fixed when it begins: how its rows are read, and its stores' metadata.

    ``state`` is the chain's, flat; ``resumed`` says that the training goes on from a checkpoint.
    """

    read: Reader
    state: dict[str, Tensor]
    manifest: Manifest
    resumed: bool


class GradientCollectorCallback(TrainerCallback):
    """A callback that collects while transformers' ``Trainer`` (or TRL's ``SFTTrainer``) trains; see the module.

    Args:
        path: the folder of the stores.
        chain: transforms in place of ``project(projection_dim)``.
        state: of a chain with fitted stages.
        projection_dim: coordinates a side; 0 keeps whole gradients.
        modules, exclude: globs over parameter names; by default the blocks' weight matrices that are trained.
        dtype: of the stored rows.
        accumulate: one store `path/sum` of each example's rows added over all epochs, in place of one an epoch.
        track_order: the stores also tell each example's step (from 1), epoch, position within the step and process.
        optimizer_moments: rows normalised by the optimizer's second moments as they stand after the row's step. What
            backward knows of each gradient is then kept until that step is made.
        scale_by_lr: rows times the step's learning rate.
        steps, epochs: which to collect, all by default: anything that knows ``in``, e.g. ``range(100)``.
        evaluate: also a store `path/eval/step_N` (`eval_NAME` of several sets) of the evaluation set's rows at every
            evaluation while training; with this chain, without the optimizer's moments.
        loss_scale: what the loss is of the sum of the examples' losses, where it is not their mean over tokens.
        overwrite: start over where the folder holds the stores of another training.

    Raises:
        FuncattribError: where training begins: a Trainer that was not prepared, or cannot be collected from.

    Example:
        >>> callback = GradientCollectorCallback("runs/example", projection_dim=8, steps=range(1, 100))
        >>> [stage.name for stage in callback.chain.stages]  # prepare_for_gradient_collection shows it at work
        ['project']
    """

    def __init__(
        self,
        path: str | Path,
        *,
        chain: Chain | None = None,
        state: State = None,
        projection_dim: int = 16,
        modules: Sequence[str] | None = None,
        exclude: Sequence[str] = (),
        dtype: Literal["float16", "bfloat16", "float32", "int8"] = "float16",
        accumulate: bool = False,
        track_order: bool = False,
        optimizer_moments: bool = False,
        scale_by_lr: bool = False,
        steps: Container[int] | None = None,
        epochs: Container[int] | None = None,
        evaluate: bool = False,
        loss_scale: LossScale | None = None,
        overwrite: bool = False,
    ) -> None:
        self.path = Path(path)
        self.chain = chain or compose(per_example_grad, *([project(projection_dim)] if projection_dim else []))
        self.state, self.modules, self.exclude, self.dtype = state, modules, tuple(exclude), dtype
        self.accumulate, self.track_order = accumulate, track_order
        self.weighing = Weighing(optimizer_moments, scale_by_lr)
        self.steps, self.epochs, self.evaluate = steps, epochs, evaluate
        self.loss_scale, self.overwrite = loss_scale, overwrite
        self.trainer: Any = None
        self._active = False
        self._begun: Begun | None = None
        self._session: Session | None = None
        self._journal: Journal | None = None
        self._epoch = 0

    def attach(self, trainer: Any) -> None:
        """Take the Trainer to collect from; ``prepare_for_gradient_collection`` calls it.

        Raises:
            FuncattribError: the callback has one.
        """
        if self.trainer is not None:
            raise FuncattribError(
                "this GradientCollectorCallback belongs to another Trainer; make one for each Trainer"
            )
        self.trainer = trainer

    def training_step(self, original: Any, rows: Tensor | None, *given: Any, **named: Any) -> Tensor:
        """Call the Trainer's step, and collect from it where it is one to keep."""
        wanted = self.steps is None or self.trainer.state.global_step + 1 in self.steps
        if self._session is None or self._journal is None or rows is None or not wanted:
            return original(*given, **named)
        self._active = True
        try:
            return self._session.training_step(original, rows, self._epoch, *given, **named)
        finally:
            self._active = False

    def compute_loss(self, original: Any, *given: Any, **named: Any) -> Any:
        """Call the Trainer's loss, and observe it inside a step."""
        if self._session is None or not self._active:
            return original(*given, **named)
        return self._session.compute_loss(original, *given, **named)

    def evaluated(self, examples: Any, name: str) -> None:
        """Store the rows of an evaluation while training, where they are wanted."""
        examples = self.trainer.eval_dataset if examples is None else examples
        examples = self.trainer.eval_dataset[examples] if isinstance(examples, str) else examples
        if self._begun is None or self._session is None or not self.evaluate or isinstance(examples, dict):
            return
        folder = self.path / name / f"step_{self.trainer.state.global_step}"
        evaluation_store(
            folder, self.trainer, self._begun.read, self._current(self._begun), self._begun.state, examples
        )

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Make everything ready."""
        if self.trainer is None:
            raise FuncattribError(
                "the Trainer was not prepared; call prepare_for_gradient_collection(trainer) before train()"
            )
        model = self.trainer.model
        names = trained(model, self.modules, self.exclude)
        params = {name: tensor for name, tensor in model.named_parameters() if name in names}
        read = reader(model, names, self.chain, self.state)
        first, announced = self.chain.init(spec(params))
        leaves = lay_out({name: leaf.shape for name, leaf in announced.items()})
        smoother = self.trainer.label_smoother
        manifest = Manifest(
            model=model_identity(model),
            data=data_identity(self.trainer.train_dataset),
            loss={
                "kind": "ce" if self.loss_scale is None else "own",
                "reduction": "sum",
                "label_smoothing": 0.0 if smoother is None else smoother.epsilon,
                "modules": list(self.modules or params),
                "exclude": list(self.exclude),
            },
            computed_with={"training": True, **self.weighing._asdict()},
            chain=self.chain.identity(),
            seed=args.seed,
            leaves=leaves,
            dtype=self.dtype,
            rows=len(self.trainer.train_dataset),
            text_columns=text_columns(self.trainer.train_dataset, self.trainer.processing_class),
            rows_per_shard=max(1, min(_SHARD_ROWS, _SHARD_BYTES // (4 * leaves[-1].stop))),
        )
        chain_state = state_tree.flatten(first if self.state is None else self.state)
        self._begun = Begun(read, chain_state, manifest, state.global_step > 0)
        self._make_room(self._begun)
        self._session = Session(self.trainer, model, read, spec(params), self.weighing, self.loss_scale, self._write)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Begin the epoch's journal."""
        self._epoch = int((state.epoch or 0) + 1e-6)
        self._journal = None
        assert self._begun is not None
        if self.epochs is not None and self._epoch not in self.epochs:
            return
        if not self.accumulate and self._begun.resumed and _finished(self._folder()):
            return  # a resumed training makes again what is there already
        if args.process_index == 0:
            save_plan(self._folder(), self._begun.manifest, self._begun.state, self._settings())
        dtype = "float32" if self.accumulate or self.dtype == "int8" else self.dtype
        self._journal = Journal(self._folder(), self._begun.manifest, self._epoch, args.process_index, dtype)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Read the rows that need the optimizer's second moments of this step."""
        if self._session is not None and self._journal is not None:
            self._session.after_optimizer_step()

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Write the rows up to a checkpoint to disk with it."""
        if self._journal is not None:
            self._journal.flush()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Build the epoch's store."""
        if self._journal is None:
            return
        self._journal.flush()
        self._journal = None
        if not self.accumulate:
            self._settle(self._folder())

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Build the sum's store."""
        self._session = None
        if self.accumulate:
            self._settle(self._folder())

    def broken_off(self) -> None:
        """Build a store of what there is, after an exception; a resumed training goes on from it."""
        self._session, journal, self._journal = None, self._journal, None
        if journal is not None:
            journal.flush()
            if self.trainer.args.world_size == 1:
                self._settle(self._folder(), partial=True)

    def _make_room(self, begun: Begun) -> None:
        """Refuse another training's folder, or remove the rows of it that wait."""
        earlier = [] if begun.resumed else [*sorted(self.path.glob("epoch_*")), *self.path.glob("sum")]
        if earlier and not self.overwrite:
            raise FuncattribError(
                f"{self.path} has {earlier[0].name} of another training\n"
                "resume that training from a checkpoint, choose another path, or set overwrite=True"
            )
        self.trainer.accelerator.wait_for_everyone()  # none writes before all have looked
        if self.trainer.args.process_index == 0:
            for folder in earlier:
                shutil.rmtree(folder / PARTS, ignore_errors=True)
        self.trainer.accelerator.wait_for_everyone()

    def _folder(self) -> Path:
        return self.path / ("sum" if self.accumulate else f"epoch_{self._epoch}")

    def _current(self, begun: Begun) -> Manifest:
        return replace(begun.manifest, model=model_identity(self.trainer.model))

    def _settings(self) -> dict[str, bool]:
        return {"add_up": self.accumulate, "track_order": self.track_order}

    def _write(self, rows: Tensor, metadata: Any, step: int) -> None:
        assert self._journal is not None
        self._journal.add(rows, metadata, step)

    def _settle(self, folder: Path, partial: bool = False) -> None:
        """Build the store, in one process, when all have written theirs."""
        assert self._begun is not None
        if not partial:
            self.trainer.accelerator.wait_for_everyone()
        if self.trainer.args.process_index == 0:
            settle(
                folder,
                self._current(self._begun),
                self._begun.state,
                metadata_of(self.trainer.train_dataset, self.trainer.processing_class),
                partial=partial,
                **self._settings(),
            )
        if not partial:
            self.trainer.accelerator.wait_for_everyone()


def _finished(folder: Path) -> bool:
    if not os.path.exists(folder / "manifest.json"):
        return False
    found = read_manifest(folder)
    return found.complete and not found.extra.get("partial")

"""Collecting per-example gradients of a data set into a store: what ``funcattrib build`` does.

documents → batches by length → chain (one backward pass a batch) → rows in the data set's order → shards
"""

import io
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from funcattrib import tree
from funcattrib.compose import Chain, State, compose
from funcattrib.data import Columns, fingerprint, load, plan
from funcattrib.errors import FuncattribError
from funcattrib.functional import Loss, Params
from funcattrib.loading import context_length, load_model, model_identity, vocabulary
from funcattrib.losses import causal_lm_loss
from funcattrib.per_example import Batch, PerExample, per_example_grad
from funcattrib.progress import Progress
from funcattrib.recipes.config import GradientConfig
from funcattrib.recipes.documents import Batches, Documents, Records, read_documents, spread
from funcattrib.recipes.explain import explained
from funcattrib.store import GradientStore, Manifest, StoreWriter, create_store, lay_out, open_store
from funcattrib.transforms import adafactor_norm, project

log = logging.getLogger(__name__)

_SHARD_ROWS = 1024
_SHARD_BYTES = 256 << 20


def collect_gradients(
    model: nn.Module | str,
    data: Records | str,
    *,
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    columns: Columns | None = None,
    split: str | None = None,
    subset: str | None = None,
    truncation: bool = False,
    max_length: int | None = None,
    chain: Chain | None = None,
    overwrite: bool = False,
    quiet: bool = False,
    config: dict[str, Any] | None = None,
    model_name: str | None = None,
    revision: str | None = None,
    **settings: Any,
) -> GradientStore:
    """Compute the gradient of every document and store it; continues a run that was interrupted.

    Args:
        model: a causal language model, or its hub id or folder.
        data: a data set, a list of records, or whatever ``--dataset`` takes.
        path: the folder of the store.
        tokenizer: the model's own where ``model`` is a name.
        columns: which columns to read; ``text`` by default.
        split, subset: of ``data``, where that is a name.
        truncation: cut documents longer than ``max_length``.
        max_length: by default the model's context.
        chain: transforms of your own in place of normalizer and projection.
        overwrite: begin anew where the folder holds another run.
        quiet: no progress on stderr.
        config: saved as ``config.yaml``.
        model_name, revision: what the manifest calls the model.
        settings: fields of ``GradientConfig``: projection_dim, normalizer, loss, modules, token_batch_size, dtype, …

    Returns:
        The open store: one row a document, in the data set's order.

    Raises:
        FuncattribError: bad input of any kind; what is finished is kept.
    """
    gradients = _settings(settings)
    if isinstance(model, str):
        model_name = model
        loaded = load_model(model)
        model, tokenizer = loaded.model, tokenizer or loaded.tokenizer
    name = data if isinstance(data, str) else "in memory"
    documents = read_documents(
        load(data, split, subset=subset) if isinstance(data, str) else data,
        tokenizer,
        columns or Columns(),
        max_length=context_length(model, tokenizer, asked=max_length),
        truncation=truncation,
        vocab_size=vocabulary(model),
    )
    if not quiet:
        for line in documents.report.lines():
            log.info(line)
    loss, params = causal_lm_loss(
        model,
        reduction=gradients.loss_reduction,
        kind=gradients.loss,
        label_smoothing=gradients.label_smoothing,
        modules=gradients.modules or None,
        exclude=gradients.exclude,
    )
    chain = chain or chain_of(gradients)
    spec = chain.init(per_example_grad.spec(params))[1]
    leaves = lay_out({name: leaf.shape for name, leaf in spec.items()})
    width = leaves[-1].stop
    manifest = Manifest(
        model=model_identity(model, model_name, revision),
        data={
            "id": name,
            "split": split,
            "subset": subset,
            "prompt_column": documents.columns.prompt_column,
            "completion_column": documents.columns.completion_column,
            "conversation_column": documents.columns.conversation_column,
            "fingerprint": fingerprint(documents.tokens),
            "documents": documents.report.documents,
            "tokens": documents.report.tokens,
        },
        loss={
            "kind": gradients.loss,
            "reduction": gradients.loss_reduction,
            "label_smoothing": gradients.label_smoothing,
            "modules": list(gradients.modules),
            "exclude": list(gradients.exclude),
            "fit_documents": gradients.fit_documents,
            "token_batch_size": gradients.token_batch_size,
        },
        chain=chain.describe(),
        seed=gradients.seed,
        leaves=leaves,
        dtype=gradients.dtype,
        rows=len(documents.rows),
        rows_per_shard=gradients.rows_per_shard or max(1, min(_SHARD_ROWS, _SHARD_BYTES // (4 * width))),
        extra={"report": documents.report._asdict()},
    )
    with create_store(path, manifest, overwrite=overwrite) as writer:
        if config is not None:
            writer.save_config(config)
        if writer.pending:
            work = Work(loss, params, chain, documents, gradients.token_batch_size, quiet)
            with explained():
                state = fitted_state(work, writer, gradients.fit_documents)
                _fill(work, writer, state)
        finished = writer.finish()
    if finished.clipped and not quiet:
        log.warning("%d entries were beyond %s and were clipped", finished.clipped, finished.dtype)
    if finished.nonfinite and not quiet:
        log.warning("%d entries are NaN or infinite; their rows come last in a search", finished.nonfinite)
    return open_store(path)


class Work(NamedTuple):
    """What one process computes: a loss, its parameters, the chain, the documents, the budget of a batch."""

    loss: Loss
    params: Params
    chain: Chain
    documents: Documents
    budget: int
    quiet: bool

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(iter(self.params.values())).device


def chain_of(gradients: GradientConfig) -> Chain:
    """The chain that the settings ask for: normalizer, then projection (TrackStar's order)."""
    stages: list[Any] = [adafactor_norm()] if gradients.normalizer == "adafactor" else []
    if gradients.projection_dim:
        stages.append(project(gradients.projection_dim, kind=gradients.projection_type, seed=gradients.seed))
    return compose(per_example_grad, *stages)


def fitted_state(work: Work, writer: StoreWriter, fit_documents: int) -> State:
    """The chain's state: what an earlier run saved, or fitted now and saved."""
    spec = per_example_grad.spec(work.params)
    if (saved := writer.load_state()) is not None:
        return tree.restore(work.chain.init(spec)[0], saved)
    passes = sum(stage.fitted for stage in work.chain.stages)
    chosen = spread(len(work.documents.rows), fit_documents)
    batches = Batches(work.documents, chosen, work.budget, work.device)
    if not passes:
        state = work.chain.init(spec)[0]
    else:
        tokens = int(work.documents.lengths[chosen].sum()) * passes
        with _progress(work, "fit", tokens) as progress:
            state = work.chain.fit(work.loss, work.params, _Counted(batches, progress))
    writer.save_state(tree.flatten(state))
    return state


def rows_of(work: Work, compute: Callable[[Batch], PerExample], rows: Sequence[int], count: Callable[..., None]) -> Any:
    """(matrix (rows, D) float32 on the CPU, losses (rows,)) of some documents, in their order."""
    matrix: Tensor | None = None
    losses = torch.zeros(len(rows))
    lengths = work.documents.lengths[list(rows)]
    for chosen in plan(lengths, work.budget):
        result = compute(work.documents.batch([rows[i] for i in chosen], work.device))
        flat = torch.cat([grad.flatten(1).float() for grad in result.grads.values()], 1).cpu()
        if matrix is None:
            matrix = flat.new_empty(len(rows), flat.shape[1])
        matrix[chosen], losses[chosen] = flat, result.losses.float().cpu()
        count(int(lengths[chosen].sum()), len(chosen))
    return matrix, losses


def _fill(work: Work, writer: StoreWriter, state: State) -> None:
    lengths, done = work.documents.lengths, writer.finished
    compute = work.chain.bind(work.loss, work.params, state)
    before = sum(int(lengths[list(writer.shard_range(i))].sum()) for i in done)
    with _progress(work, "build", int(lengths.sum()), before) as progress:
        for shard in writer.pending:
            span = writer.shard_range(shard)
            matrix, losses = rows_of(work, compute, span, progress.update)
            shown = work.documents.shown(span)
            writer.put(shard, matrix, {**shown, "loss": losses.numpy(), "tokens": lengths[list(span)]})


class _Counted:
    """Batches that count themselves as they are taken."""

    def __init__(self, batches: Batches, progress: Progress) -> None:
        self.batches, self.progress = batches, progress

    def __iter__(self) -> Any:
        for chosen, batch in zip(self.batches.plan, self.batches, strict=True):
            yield batch
            indices = self.batches.indices[chosen]
            self.progress.update(int(self.batches.documents.lengths[indices].sum()), len(chosen))


def _progress(work: Work, label: str, tokens: int, done: int = 0) -> Progress:
    return Progress(tokens, label=label, done=done, stream=io.StringIO() if work.quiet else None)


def _settings(settings: dict[str, Any]) -> GradientConfig:
    unknown = sorted(settings.keys() - GradientConfig.__dataclass_fields__.keys())
    if unknown:
        known = ", ".join(GradientConfig.__dataclass_fields__)
        raise FuncattribError(f"expected settings among {known}; found {unknown[0]!r}")
    for name in ("modules", "exclude"):
        value = settings.get(name)
        settings = {**settings, name: (value,) if isinstance(value, str) else tuple(value or ())}
    return GradientConfig(**settings)

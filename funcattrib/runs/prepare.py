"""Preparation of a run: from what a user names (a model, data, settings) to the work and its manifest."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor, nn

from funcattrib.chain import per_example, state_tree
from funcattrib.chain.chain import Chain
from funcattrib.chain.code_hash import code_hash
from funcattrib.chain.per_example import per_example_grad
from funcattrib.chain.transform import State
from funcattrib.data import Columns
from funcattrib.data.corpus import Corpus
from funcattrib.data.numeric_examples import Examples
from funcattrib.data.records import Records, open_examples, open_records
from funcattrib.data.source_target import Pairs
from funcattrib.errors import FuncattribError
from funcattrib.losses.documents import read_for
from funcattrib.losses.resolve import KINDS, find_loss, loss_of, task_of_loss
from funcattrib.models.base_model import base_identity
from funcattrib.models.functional import device_of, parameters_of, sharing
from funcattrib.models.identity import model_identity, parameters_identity
from funcattrib.models.limits import context_length
from funcattrib.models.loading import PRECISIONS, Loaded, load_model, load_tokenizer
from funcattrib.runs.config import GradientConfig
from funcattrib.runs.default_chain import chain_of
from funcattrib.runs.oom_retry import Pieces
from funcattrib.runs.settings import Source
from funcattrib.runs.workload import Work, fit_state, template
from funcattrib.runtime.world import world
from funcattrib.store import GradientStore, Manifest, StoreWriter, lay_out, open_store
from funcattrib.store.compatibility import check_state
from funcattrib.types import Batch, Loss, Params
from funcattrib.weights.content_hash import hash_tensors
from funcattrib.weights.lockstep import Lockstep

log = logging.getLogger(__name__)

Model: TypeAlias = nn.Module | str | tuple[Loss, Params]
"""A causal language model, a sequence classification model or an encoder-decoder, its hub id or folder, or a user's
loss with the parameters to attribute.

Parameters are name → tensor, or what the chain's source takes (a JAX pytree)."""

_SHARD_ROWS = 1024
_SHARD_BYTES = 256 << 20


class Inputs(NamedTuple):
    """Documents that have been read: tokenised and checked. ``name`` is the manifest's."""

    name: str
    corpus: Corpus


class Prepared(NamedTuple):
    """The work of a run, the manifest of its result, and the store whose state was given.

    With ``token_batch_size="auto"`` the budget is 0 until ``token_budget.with_budget`` has found it.
    """

    work: Work
    manifest: Manifest
    given: GradientStore | None


def prepare(
    model: Model,
    data: Records | Inputs,
    source: Source,
    gradients: GradientConfig,
    chain: Chain | None,
    state: str | Path | None,
) -> Prepared:
    """Load, tokenise and check everything; nothing is computed or written yet.

    Raises:
        FuncattribError: bad input of any kind.
    """
    model, source = load_named(model, source)
    inputs = data if isinstance(data, Inputs) else read_inputs(model, data, source, gradients)
    corpus = inputs.corpus
    reference = source.reference_model
    assert not isinstance(reference, str), "load_named has loaded it"
    loss, params, module, identity = (
        _own_loss(model, source, per_example_grad if chain is None else chain.started())
        if isinstance(model, tuple)
        else _language_model(model, source, gradients, reference)
    )
    chain = chain or chain_of(gradients, module)
    first, spec = chain.init(chain.started().spec(params))
    leaves = lay_out({name: leaf.shape for name, leaf in spec.items()})
    rows_per_shard = gradients.rows_per_shard or shard_rows(leaves[-1].stop)
    budget = 0 if gradients.token_batch_size == "auto" else gradients.token_batch_size
    if isinstance(corpus, Pairs) and getattr(loss, "equal_lengths", False):
        budget = 1  # every pair is a batch
    manifest = Manifest(
        model=identity,
        data={
            "id": inputs.name,
            "split": source.split,
            "subset": source.subset,
            **corpus.identity(),
        },
        loss={
            "kind": "own" if isinstance(model, tuple) else gradients.loss,
            "reduction": gradients.loss_reduction,
            "label_smoothing": gradients.label_smoothing,
            "reference": source.reference_identity,
            "modules": list(gradients.modules),
            "exclude": list(gradients.exclude),
            **_code_of_loss(model, source, gradients),
            **_task(model, source, gradients),
        },
        computed_with={"token_batch_size": budget, **_fitted_on(chain, first, gradients)},
        chain=chain.identity(),
        seed=gradients.seed,
        leaves=leaves,
        dtype=gradients.dtype,
        rows=len(corpus.lengths),
        rows_per_shard=rows_per_shard,
        text_columns=corpus.text_columns,
        extra={**corpus.notes(), **({} if isinstance(model, tuple) else {"base_model": base_identity(model)})},
    )
    pieces = Pieces(partial(_described, corpus))
    step = Lockstep(sharing(*map(_parameters, (module, reference))), partial(_shortest, corpus, params))
    work = Work(loss, params, chain, corpus, budget, source.quiet, pieces, world(), step)
    prepared = Prepared(work, manifest, None)
    return prepared if state is None else with_state(prepared, open_store(state))


def _task(model: nn.Module | tuple[Loss, Params], source: Source, gradients: GradientConfig) -> dict[str, Any]:
    """Return the manifest's entry for what the loss is of, where that is not the tokens of a causal language model."""
    if isinstance(model, tuple):
        return {}
    task = task_of_loss(model, source.loss_function or gradients.loss)
    return {} if task == "causal_lm" else {"task": task}


def _code_of_loss(model: nn.Module | tuple[Loss, Params], source: Source, gradients: GradientConfig) -> dict[str, Any]:
    """Return the manifest's entry for the code of a user's loss; nothing of a loss of this library."""
    if isinstance(model, tuple):
        code = code_hash(model[0], "the loss")
    elif source.loss_function is None and gradients.loss in KINDS:
        return {}
    else:
        code = code_hash(source.loss_function or find_loss(gradients.loss), f"the loss {gradients.loss}")
    return {} if code is None else {"code": code}


def _parameters(model: nn.Module | Params | None) -> Params:
    if isinstance(model, nn.Module):
        return parameters_of(model)
    return model if isinstance(model, Mapping) else {}


def _shortest(corpus: Corpus, params: Params) -> Batch:
    """Return the batch that a process without work computes, so that the others have its weights."""
    return corpus.batch([int(corpus.lengths.argmin())], device_of(params))


def with_state(prepared: Prepared, given: GradientStore) -> Prepared:
    """Return the same work with the state that another run fitted.

    Raises:
        ChainError: it was fitted for another model, chain, or set of parameters; the message names which.
    """
    check_state(prepared.manifest, given)
    made_with = {
        "token_batch_size": prepared.work.budget,
        "state": None if given.manifest.state is None else given.manifest.state.sha256,
    }
    return prepared._replace(given=given, manifest=replace(prepared.manifest, computed_with=made_with))


def shard_rows(width: int, most: int = _SHARD_ROWS) -> int:
    """Compute the rows of a shard where nobody says how many."""
    return max(1, min(most, _SHARD_BYTES // (4 * width)))


def state_of(prepared: Prepared, writer: StoreWriter, fit_documents: int) -> State:
    """Return the chain's state: what an earlier run saved, or the one given, or fitted now; saved with the rows."""
    if prepared.given is None:
        return fit_state(prepared.work, fit_documents, writer)
    saved = prepared.given.state()
    state = state_tree.restore(template(prepared.work), saved)
    writer.save_state(saved)
    return state


_Parts = tuple[Loss, Mapping[str, Tensor], nn.Module | Params, dict[str, Any]]


def load_named(model: Model | Path, source: Source) -> tuple[nn.Module | tuple[Loss, Params], Source]:
    """Return the model, and the source with its name, tokenizer and reference model: each is loaded where it is a name.

    Raises:
        FuncattribError: no causal language model of that name, or no tokenizer; (loss, params) with a reference model.
    """
    if isinstance(model, str | Path):
        named = source.tokenizer if isinstance(source.tokenizer, str) else None
        loaded = load_model(str(model), tokenizer=named, revision=source.revision, **source.loading._asdict())
        tokenizer = loaded.tokenizer if named or source.tokenizer is None else source.tokenizer
        identity = model_identity(loaded.model, loaded.name, source.revision, loaded.stamps)
        model, source = loaded.model, replace(source, tokenizer=tokenizer, model_name=loaded.name, identity=identity)
    elif isinstance(source.tokenizer, str):
        options = {"trust_remote_code": source.loading.trust_remote_code}
        source = replace(source, tokenizer=load_tokenizer(source.tokenizer, options))
    if not isinstance(model, nn.Module | tuple) or (isinstance(model, tuple) and len(model) != 2):
        cure = "load it into the model first" if isinstance(model, Mapping) else "give one of these"
        raise FuncattribError(
            f"expected a model, its name or folder, or (loss, params), found {type(model).__name__}\n{cure}"
        )
    if isinstance(model, tuple) and (source.loss_function is not None or source.reference_model is not None):
        raise FuncattribError(
            "(loss, params) cannot be combined with `loss` or `reference_model`; give a model, or leave these out"
        )
    if isinstance(model, nn.Module) and isinstance(source.reference_model, str):
        loaded = _beside(model, source.reference_model)
        identity = model_identity(loaded.model, stamps=loaded.stamps)
        source = replace(source, reference_model=loaded.model, reference_identity=identity)
    if isinstance(model, nn.Module) and source.identity is None:
        source = replace(source, identity=model_identity(model, source.model_name, source.revision))
    if isinstance(source.reference_model, nn.Module) and source.reference_identity is None:
        source = replace(source, reference_identity=model_identity(source.reference_model))
    return model, source


def read_inputs(
    model: nn.Module | tuple[Loss, Params], data: Records, source: Source, gradients: GradientConfig
) -> Inputs:
    """Read, tokenise and check documents for a model: all that is wrong with them is said before anything is computed.

    Raises:
        FuncattribError: data that cannot be read, or a document that is too long.
    """
    name = str(data) if isinstance(data, str | Path) else "in memory"
    if isinstance(model, tuple):
        return Inputs(name, Examples(open_examples(data, source.split, subset=source.subset)))
    tokenizer, columns = source.tokenizer, source.columns or Columns()
    assert not isinstance(tokenizer, str), "load_named has loaded it"
    documents = read_for(
        task_of_loss(model, source.loss_function or gradients.loss),
        model,
        open_records(data, source.split, subset=source.subset, text_column=columns.prompt),
        tokenizer,
        columns,
        max_length=context_length(model, tokenizer, asked=source.max_length),
        truncation=source.truncation,
        own_loss=source.loss_function is not None or gradients.loss not in KINDS,
        name=name if isinstance(data, str | Path) else "the data",
    )
    if not source.quiet:
        for line in documents.lines():
            log.info(line)
    return Inputs(name, documents)


def _language_model(model: nn.Module, source: Source, gradients: GradientConfig, reference: nn.Module | None) -> _Parts:
    loss, params = loss_of(
        model,
        source.loss_function or gradients.loss,
        reduction=gradients.loss_reduction,
        label_smoothing=gradients.label_smoothing,
        reference=reference,
        modules=gradients.modules or None,
        exclude=gradients.exclude,
    )
    assert source.identity is not None, "load_named has computed it"
    return loss, params, model, dict(source.identity)


def _described(corpus: Corpus, row: int) -> str:
    """Describe a document for an error: number, id and length."""
    name = corpus.metadata(range(row, row + 1))["id"][0]
    return f"row {row}{'' if name == str(row) else f' (id {name})'} of {int(corpus.lengths[row]):,} tokens"


def _beside(model: nn.Module, name: str) -> Loaded:
    """Load another model where ``model`` is, in its precision."""
    weight = next(model.parameters())
    precision = PRECISIONS[str(weight.dtype).removeprefix("torch.")]
    return load_model(name, device=str(weight.device), precision=precision)


def _own_loss(model: tuple[Loss, Params], source: Source, gradients: per_example.GradientSource) -> _Parts:
    loss, params = model
    if not callable(loss):
        raise FuncattribError(f"expected a loss function and its parameters, found {type(loss).__name__} for the loss")
    tensors = gradients.named(params)
    name = source.model_name or str(getattr(loss, "__qualname__", type(loss).__name__))
    return loss, params, params, parameters_identity(tensors, name)


def _fitted_on(chain: Chain, first: State, gradients: GradientConfig) -> dict[str, Any]:
    """Return the origin of a state that is fitted here: documents, and the numbers a stage was given.

    It distinguishes stores made with different moments or Gram matrices.
    """
    numbers = {
        f"{at}/{name}": tensor
        for at, (stage, state) in enumerate(zip(chain.stages, first, strict=True))
        if not stage.fitted
        for name, tensor in state_tree.flatten(state).items()
    }
    hashes = hash_tensors(numbers)
    given = {"given": hashes.sampled, "given_content": hashes.content} if numbers else {}
    return {"fit_documents": gradients.fit_documents, **given}

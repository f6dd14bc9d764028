"""``Attributor``: a finished store, searched for the training examples that align with a query.

    score(train, query) = ⟨transformed train gradient, transformed query gradient⟩

Positive means proponent: a step that unlearns the training example raises the query's loss.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from funcattrib.chain import state_tree
from funcattrib.chain.chain import Chain
from funcattrib.chain.per_example import per_example_grad
from funcattrib.data import Columns, plan
from funcattrib.data.corpus import Corpus
from funcattrib.data.numeric_examples import Examples
from funcattrib.data.records import open_records
from funcattrib.data.source_target import Pairs
from funcattrib.errors import FuncattribError
from funcattrib.kernels.safe_norm import as_rows
from funcattrib.losses.documents import read_for
from funcattrib.losses.resolve import KINDS
from funcattrib.models.functional import device_of
from funcattrib.models.identity import change_marks, model_identity
from funcattrib.models.limits import context_length
from funcattrib.models.loading import PRECISIONS, Loaded, load_model
from funcattrib.models.selection import choose
from funcattrib.query.faiss_index import FaissConfig, FaissIndex, build_or_load
from funcattrib.query.faiss_index import search as search_index
from funcattrib.query.hits import Hit, Trace
from funcattrib.query.stored_loss import check_given, check_named, stored_loss
from funcattrib.query.topk import TopK, store_blocks, topk
from funcattrib.query.traced_model import traced_model
from funcattrib.query.unique import unique_topk
from funcattrib.store import GradientStore, open_store
from funcattrib.store.compatibility import (
    check_chain,
    check_kind,
    check_leaves,
    check_same_model,
    check_same_state,
)
from funcattrib.store.row_text import row_text
from funcattrib.training.capture import collecting
from funcattrib.transforms.registry import rebuild
from funcattrib.types import Batch, Grads, Loss, Params, PerExample

_BUDGET = 4096


class _Bound(NamedTuple):
    """A store's loss, its chain as a function of the batch, and the device of the parameters."""

    loss: Loss
    compute: Callable[[Batch], PerExample]
    device: torch.device


class _Traced(NamedTuple):
    """A model that was traced, marks that change with it, and the module with its parameters by the store's names."""

    given: nn.Module
    marks: Any
    whole: nn.Module


class Attributor:
    """A search of one store.

    Args:
        run: the store's folder.
        model: the model that made it, its name, or (loss, params) where the store was made with those; by default the
            model that the store names, loaded when first needed.
        tokenizer: the model's own where ``model`` is a name.
        device: where exact search is computed, and a model that is loaded here.
        unit_norm: cosine in place of inner product.
        faiss_cfg: search through a FAISS index instead of exactly.
        chain: only for stores made with a user's transforms.
        state: a folder with the fitted state, which must be the one that the store was made with.

    Raises:
        FuncattribError: no store of gradients; a model, chain or state other than the store's.

    Example:
        >>> import tempfile
        >>> from funcattrib.runs.collect import collect_gradients
        >>> loss = lambda params, example: (params["w"] * example["x"]).sum() ** 2
        >>> data = [{"x": [1.0, 0.0]}, {"x": [0.0, 1.0]}, {"x": [1.0, 1.0]}]
        >>> with tempfile.TemporaryDirectory() as run:
        ...     store = collect_gradients((loss, {"w": torch.ones(2)}), data, path=run, quiet=True)
        ...     Attributor(run, unit_norm=True).search({"w": torch.tensor([[3.0, 0.0]])}, k=2).rows
        tensor([[0, 2]])
    """

    def __init__(
        self,
        run: str | Path,
        *,
        model: nn.Module | str | Path | Loaded | tuple[Loss, Params] | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        device: str | torch.device = "cpu",
        unit_norm: bool = False,
        faiss_cfg: FaissConfig | None = None,
        chain: Chain | None = None,
        state: str | Path | None = None,
    ) -> None:
        self.store: GradientStore = open_store(run)
        check_kind(self.store.manifest, run, "gradients")
        self.device = torch.device(device)
        self.unit_norm = unit_norm
        self._model = str(model) if isinstance(model, Path) else model
        self._tokenizer, self._chain = tokenizer, chain
        self._checked: nn.Module | None = None
        self._traced: _Traced | None = None
        if chain is not None:
            check_chain(self.store.manifest, chain.identity())
        if state is not None:
            check_same_state(self.store, open_store(state))
        self._compute: _Bound | None = None
        self._index: FaissIndex | None = None
        if faiss_cfg is not None:
            self._index = build_or_load(self.store, faiss_cfg, metric="cosine" if unit_norm else "ip")

    def search(self, grads: Grads | Float[Tensor, "K D"], k: int = 5, *, reverse: bool = False) -> TopK:
        """Find the k best rows for each query gradient.

        Args:
            grads: transformed gradients, name → (K, *shape) as the store's leaves, or rows (K, D).
            reverse: opponents (lowest scores) instead of proponents.
        """
        queries = self._rows(grads) if isinstance(grads, Mapping) else grads.float()
        if self._index is not None:
            return search_index(self._index, queries.cpu(), k, largest=not reverse)
        return topk(
            store_blocks(self.store), queries, k, largest=not reverse, unit_norm=self.unit_norm, device=self.device
        )

    def ask(
        self,
        records: Sequence[Mapping[str, Any] | str],
        k: int = 5,
        *,
        columns: Columns | None = None,
        reverse: bool = False,
        unique: bool = False,
    ) -> list[list[Hit]]:
        """Find the k best training examples for each record: a text, or a row with the columns of ``columns``.

        The query's gradient comes from the store's own loss and chain. ``columns`` are the store's by default. With
        ``unique`` each text is found once, whatever its case, white space and unicode form.
        """
        return self.best(self.gradients(records, columns=columns), k, reverse=reverse, unique=unique)

    def best(
        self, grads: Grads | Float[Tensor, "K D"], k: int = 5, *, reverse: bool = False, unique: bool = False
    ) -> list[list[Hit]]:
        """Find the k best training examples for each query gradient; ``unique`` as in ``ask``."""
        return self._best(grads, k, reverse, unique)[1]

    def gradients(
        self, records: Sequence[Mapping[str, Any] | str], *, columns: Columns | None = None
    ) -> Float[Tensor, "K D"]:
        """Compute transformed gradients of queries, one row a record, in the store's layout."""
        if isinstance(self._model, tuple) and not isinstance(self._model, Loaded):
            return self._gradients_of_examples(records)
        model, tokenizer = self._loaded()
        columns = columns or self._columns(records)
        rows = [{columns.prompt: r} if isinstance(r, str) else dict(r) for r in records]
        loss = self.store.manifest.loss
        corpus = read_for(
            loss.get("task", "causal_lm"),
            model,
            open_records(rows),
            tokenizer,
            columns,
            max_length=context_length(model, tokenizer),
            truncation=True,
            own_loss=loss["kind"] not in KINDS,
            name="the query",
        )
        found = self._gradients_of(corpus)
        if not found.any():
            raise FuncattribError(
                "the query's gradient is zero: its text has fewer than two tokens that count; give a longer text"
            )
        return found

    def _gradients_of(self, corpus: Corpus) -> Float[Tensor, "K D"]:
        """Compute transformed gradients of a corpus, one row an example."""
        loss = self._bound().loss
        alone = isinstance(corpus, Pairs) and getattr(loss, "equal_lengths", False)
        equal_lengths = getattr(loss, "equal_lengths", False)
        batches = plan(corpus.lengths, 1 if alone else _BUDGET, equal_lengths=equal_lengths)
        found = torch.cat([self.gradients_of(corpus.batch(chosen)) for chosen in batches])
        out = torch.empty_like(found)
        out[[row for chosen in batches for row in chosen]] = found
        return out

    def gradients_of(self, batch: Batch) -> Float[Tensor, "B D"]:
        """Compute transformed gradients of a batch of tokens, (B, D) on the CPU."""
        bound = self._bound()
        return self._rows(bound.compute({name: tensor.to(bound.device) for name, tensor in batch.items()}).grads)

    def _bound(self) -> _Bound:
        """Return the chain bound to the store's loss, made on the first call."""
        if self._compute is None:
            if isinstance(self._model, tuple) and not isinstance(self._model, Loaded):
                loss, params = self._model
                source = per_example_grad if self._chain is None else self._chain.started()
                check_given(self.store.manifest, loss, source.named(params))
            else:
                loss, params = stored_loss(self._loaded()[0], self.store.manifest, self.device)
            chain, state = self._state(params)
            self._compute = _Bound(loss, chain.bind(loss, params, state), device_of(chain.started().named(params)))
        return self._compute

    @contextmanager
    def trace(self, model: nn.Module, k: int = 5, *, reverse: bool = False, unique: bool = False) -> Iterator[Trace]:
        """Search with the gradients of the user's own forward and backward pass inside the block.

        The model computes as ever (its own loss, its own gradients) and stays as it was. A loss averaged over the
        batch scales every example's gradient alike: ranks are unchanged. ``model`` may be the base of the store's model
        (``model.base_model``), where none of the store's parameters is used outside of it.

        Example:
            ``with attributor.trace(model, 5) as found: model(ids, labels=ids).loss.backward()``, then ``found.hits``.
        """
        whole = self._whole(model)
        params = {n: p.detach() for n, p in whole.named_parameters() if n in self._attributed(whole)}
        chain, state = self._state(params)
        result = Trace()
        with collecting(whole, params, chain, state, called=model) as collected:
            yield result
        result.fill(*self._best(collected.grads(), k, reverse, unique))

    def hits(self, values: Float[Tensor, " k"], rows: Tensor) -> list[Hit]:
        """Return scores and row numbers with the examples' metadata; places that an index did not fill are dropped."""
        found = []
        for rank, (value, row) in enumerate(zip(values.tolist(), rows.tolist(), strict=True), 1):
            if row >= 0:
                found.append(Hit(rank, value, row, self.store.examples[row], self._text(row)))
        return found

    def _best(
        self, grads: Grads | Float[Tensor, "K D"], k: int, reverse: bool, unique: bool
    ) -> tuple[TopK, list[list[Hit]]]:
        if not unique:
            plain = self.search(grads, k, reverse=reverse)
            return plain, [self.hits(values, rows) for values, rows in zip(*plain, strict=True)]
        rows = self._rows(grads) if isinstance(grads, Mapping) else grads
        found = unique_topk(partial(self.search, rows, reverse=reverse), self._text, k, len(self.store))
        hits = [self.hits(values, chosen) for values, chosen in zip(found.values, found.rows, strict=True)]
        counted = [
            [hit._replace(copies=int(count)) for hit, count in zip(each, counts, strict=False)]
            for each, counts in zip(hits, found.copies, strict=True)
        ]
        return TopK(found.values, found.rows), counted

    def _text(self, row: int) -> str:
        manifest = self.store.manifest
        return row_text(self.store.examples, row, manifest.text_columns, by_token=manifest.by_token)

    def _gradients_of_examples(self, records: Sequence[Mapping[str, Any] | str]) -> Float[Tensor, "K D"]:
        """Compute the rows of examples for a user's loss, which are numbers as they are."""
        if any(isinstance(record, str) for record in records):
            raise FuncattribError("this store's loss takes examples of numbers, found a text; give dicts of numbers")
        examples = Examples([dict(record) for record in records if not isinstance(record, str)])
        rows = [examples.batch([number]) for number in range(len(records))]
        return torch.cat([self.gradients_of(batch) for batch in rows])

    def _whole(self, model: nn.Module) -> nn.Module:
        """Return a model that is traced by the store's names; one that did not change since is not checked again."""
        marks = change_marks(model)
        if self._traced is None or self._traced.given is not model or self._traced.marks != marks:
            self._traced = _Traced(model, marks, traced_model(self.store.manifest, model))
        return self._traced.whole

    def _columns(self, records: Sequence[Mapping[str, Any] | str]) -> Columns:
        if any(isinstance(record, str) for record in records):
            return Columns()
        data = self.store.manifest.data
        names = ("prompt_column", "completion_column", "conversation_column", "label_column")
        named = {name: data[name] for name in names if name in data}
        return Columns(**{name: value for name, value in named.items() if (name, value) != ("prompt_column", "text")})

    def _rows(self, grads: Grads) -> Tensor:
        """Join leaves to rows, (K, D) on the CPU, leaves in the store's order."""
        check_leaves(self.store.leaves, {name: tuple(grad.shape[1:]) for name, grad in grads.items()})
        return torch.cat([as_rows(grads[name]).float().cpu() for name in self.store.leaves], 1)

    def _loaded(self) -> tuple[nn.Module, PreTrainedTokenizerBase | None]:
        if self._model is None:
            check_named(self.store.manifest)
            self._model = str(self.store.manifest.model["id"])
        if isinstance(self._model, str):
            made_with = self.store.manifest.model
            named = made_with["id"] == self._model
            self._model = load_model(
                self._model,
                revision=made_with["revision"] if named else None,
                precision=PRECISIONS.get(made_with["dtype"], "fp32"),
                device=str(self.device),
            )
        if isinstance(self._model, Loaded):
            loaded = self._model
            self._model, self._tokenizer = loaded.model, self._tokenizer or loaded.tokenizer
            identity = model_identity(loaded.model, loaded.name, stamps=loaded.stamps)
            check_same_model(self.store.manifest, identity)
            self._checked = self._model
        assert isinstance(self._model, nn.Module), "(loss, params) have no tokenizer"
        if self._model is not self._checked:
            check_same_model(self.store.manifest, model_identity(self._model))
            self._checked = self._model
        return self._model, self._tokenizer

    def _attributed(self, model: nn.Module) -> set[str]:
        loss = self.store.manifest.loss
        return choose(model, loss["modules"] or None, loss["exclude"])

    def _state(self, params: Params) -> tuple[Chain, Any]:
        chain = self._chain or rebuild(per_example_grad, self.store.manifest.chain)
        template, saved = chain.init(chain.started().spec(params))[0], self.store.state()
        if not saved and state_tree.flatten(template):
            raise FuncattribError(
                f"{self.store.path} has no fitted state for its chain; finish building the store first"
            )
        return chain, state_tree.restore(template, saved)

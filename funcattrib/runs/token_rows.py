"""Rows (document, token) in place of a row a document: the terms that a document's gradient is the sum of.

The tokens of all documents stand one after the other, so a shard may begin and end inside a document. Statistics are
those of whole documents: only so do the parts add up to what a store or a score of documents holds.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from funcattrib.chain.lowering import nonlinear
from funcattrib.chain.per_example import per_example_grad
from funcattrib.chain.per_token import per_token_grad
from funcattrib.chain.transform import State
from funcattrib.data.documents import Documents
from funcattrib.data.labelled import Labelled
from funcattrib.data.source_target import Pairs
from funcattrib.errors import FuncattribError
from funcattrib.runs.workload import Work, flat, progress
from funcattrib.runtime.memory import trim
from funcattrib.store import Manifest, StoreWriter
from funcattrib.types import Batch, PerExample

MOST_ROWS = 1 << 16
"""Rows of a shard, where nobody says how many."""


def by_token(manifest: Manifest, work: Work, rows_per_shard: int) -> Manifest:
    """Return the manifest of a run with a row a token.

    Raises:
        FuncattribError: a chain with stages that are not linear, whose parts would not add up, or gradients that are
            not torch's.
    """
    if (source := work.chain.started()) not in (per_example_grad, per_token_grad):
        raise FuncattribError(f"granularity 'token' requires a chain of per_example_grad, found {source.name}")
    if isinstance(work.corpus, Labelled | Pairs):
        raise FuncattribError("granularity 'token' requires a causal language model, whose loss is a sum over tokens")
    others = nonlinear(work.chain.stages, source.spec(work.params))
    if name := next((name for name in others if name not in ("precondition", "max_score")), None):
        raise FuncattribError(f"granularity 'token' requires linear stages, and {name} is not linear; leave it out")
    return replace(
        manifest,
        rows=int(work.corpus.lengths.sum()),
        rows_per_shard=rows_per_shard,
        computed_with={**manifest.computed_with, "granularity": "token"},
        text_columns=() if _tokenizer(work) is None else ("text",),
    )


def as_tokens(work: Work) -> Work:
    """Return the work with a row a token in place of a row a document."""
    return work._replace(chain=work.chain._replace(source=per_token_grad))


def fill_tokens(work: Work, writer: StoreWriter, state: State, label: str = "build") -> None:
    """Compute and hand over every pending shard of rows (document, token)."""
    compute, ends = as_tokens(work).bind(state), np.cumsum(work.corpus.lengths)
    before = int(ends[-1]) - sum(len(writer.shard_range(i)) for i in writer.pending)
    with progress(work, label, int(ends[-1]), before) as bar:
        for shard in work.step.through(writer.claims()):
            span = writer.shard_range(shard)
            first, last = (int(at) for at in np.searchsorted(ends, [span.start, span.stop - 1], side="right"))
            documents = range(first, last + 1)
            matrix, losses = _rows_of(work, compute, documents)
            metadata = _metadata(work, documents, losses)
            skipped = span.start - int(ends[first] - work.corpus.lengths[first])
            inside = slice(skipped, skipped + len(span))
            writer.put(shard, matrix[inside].clone(), {name: values[inside] for name, values in metadata.items()})
            bar.update(len(span), len(documents))


def _rows_of(work: Work, compute: Callable[[Batch], PerExample], documents: range) -> tuple[Tensor, np.ndarray]:
    """Compute (rows (tokens, D) float32 on the CPU, the documents' losses), in order."""
    lengths = work.corpus.lengths[list(documents)]
    parts: list[Tensor] = [torch.empty(0)] * len(documents)
    losses = np.zeros(len(documents), dtype=np.float32)
    for chosen in work.plan(lengths):
        trim()
        rows_of_batch = [documents[i] for i in chosen]
        batch = work.corpus.batch(rows_of_batch, work.device)
        pieces = [*work.pieces(lambda part: flat(compute(part)), batch, rows_of_batch, work.device)]
        by_document, of_losses = (torch.cat(each).unflatten(0, (len(chosen), -1)) for each in zip(*pieces, strict=True))
        for i, rows, loss in zip(chosen, by_document, of_losses, strict=True):
            parts[i] = rows[: lengths[i]] if bool(loss[0].isfinite()) else rows[: lengths[i]] * torch.nan
            losses[i] = float(loss[0])
    return torch.cat(parts), losses


def _metadata(work: Work, documents: range, losses: np.ndarray) -> dict[str, Any]:
    """Return of every token its document's id, number, loss and kept columns, its position, and its text."""
    lengths = work.corpus.lengths[list(documents)]
    of_documents = work.corpus.metadata(documents)
    ids = of_documents["id"]
    positions = [at for length in lengths for at in range(length)]
    metadata: dict[str, Any] = {
        "id": [f"{name}:{at}" for name, length in zip(ids, lengths, strict=True) for at in range(length)],
        "document": np.repeat(np.asarray(documents), lengths),
        "position": np.asarray(positions),
        "loss": np.repeat(losses, lengths),
    }
    kept = work.corpus.kept_columns if isinstance(work.corpus, Documents) else ()
    for name in kept:
        metadata[name] = [
            value for value, length in zip(of_documents[name], lengths, strict=True) for _ in range(length)
        ]
    if isinstance(work.corpus, Documents) and (tokenizer := _tokenizer(work)) is not None:
        rows = work.corpus.rows
        metadata["text"] = [tokenizer.decode([int(token)]) for i in documents for token in rows[i]["input_ids"]]
    return metadata


def _tokenizer(work: Work) -> PreTrainedTokenizerBase | None:
    """Return what decodes a token to show it, where there is one."""
    return work.corpus.tokenizer if isinstance(work.corpus, Documents) else None

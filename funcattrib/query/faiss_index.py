"""A FAISS index over a store's rows: built on the first call, cached beside the store, searched like `topk`.

The metric is the inner product; a cosine is the inner product of unit rows with unit queries. Rows that hold NaN or
infinity are not in the index; they come last, with NaN for a score. FAISS is imported when an index is first asked for.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from funcattrib.errors import FuncattribError
from funcattrib.kernels.safe_norm import divisors
from funcattrib.query import faiss_cache
from funcattrib.query.faiss_cache import reason
from funcattrib.query.faiss_device import check_device, import_faiss, place
from funcattrib.query.topk import TopK, check_query_rows, store_blocks, topk
from funcattrib.store.nonfinite import nonfinite_rows

if TYPE_CHECKING:
    from funcattrib.store import GradientStore

Metric = Literal["ip", "cosine"]

log = logging.getLogger(__name__)
_RECALL_QUERIES, _RECALL_K = 64, 10


@dataclass(frozen=True)
class FaissConfig:
    """Settings of an index and of its search.

    Attributes:
        index_factory: FAISS' factory string: "Flat" (exact), "IVF1,SQfp16", "IVF256,PQ32", "HNSW32", …
        mmap_index: leave the index on the disk and map it, instead of reading it into memory.
        sample_rows: rows an index that needs training is trained on; they take sample_rows × width × 4 bytes.
        nprobe: inverted lists visited per query, where the index has any.
        ef_search: candidates a graph index (HNSW) keeps while searching; raised to k where k is larger.
        device: "cpu", or "cuda" (or "cuda:1"): there the index is trained, filled and searched on the GPU, if FAISS
            was built for GPUs and has the index there; it is cached in its CPU form.
        seed: of the training sample.

    Example:
        >>> FaissConfig("IVF1,SQfp16", mmap_index=True).nprobe
        16
    """

    index_factory: str = "Flat"
    mmap_index: bool = False
    sample_rows: int = 32_768
    nprobe: int = 16
    ef_search: int = 64
    device: str = "cpu"
    seed: int = 0


class FaissIndex(NamedTuple):
    """An index ready to be searched.

    index: the faiss index; metric: "ip" or "cosine"; recall: recall@10 against exact search, measured when built;
    built: True where this call built it, False where it came from the cache; path: its folder;
    left_out: the rows that hold NaN or infinity, ascending.
    """

    index: Any
    metric: Metric
    config: FaissConfig
    recall: float
    built: bool
    path: Path
    left_out: np.ndarray = np.empty(0, np.int64)


def build_or_load(
    store: GradientStore,
    config: FaissConfig | None = None,
    *,
    metric: Metric = "ip",
    cache: Path | str | None = None,
    say: Callable[[str], None] | None = None,
) -> FaissIndex:
    """Return the index of a store: read from the cache, or built and cached.

    Args:
        store: an open gradient store.
        config: the index and its settings; by default FaissConfig().
        metric: "ip" (inner product) or "cosine".
        cache: folder of cached indexes; by default `faiss` in the store's folder.
        say: takes a line when an index is built (with its recall) or a broken one replaced; by default the log.

    Returns:
        FaissIndex. Where the cache is read-only it is in memory alone, and a line says so.

    Raises:
        FuncattribError: FAISS is not installed, does not know the factory string, or has too few rows to train on.
    """
    config = config or FaissConfig()
    _check(store, config, metric)
    faiss = import_faiss()
    if config.device != "cpu":
        check_device(faiss, config.device)
    settings = {"metric": metric, **asdict(config)}
    folder = Path(cache if cache is not None else store.path / "faiss") / faiss_cache.key(store, settings)
    if folder.exists():
        try:
            index, meta = faiss_cache.read(folder, store, mmap=config.mmap_index)
            left_out = np.asarray(meta.get("left_out", []), np.int64)
            return FaissIndex(
                place(faiss, index, config.device, config.index_factory),
                metric,
                config,
                float(meta["recall"]),
                False,
                folder,
                left_out,
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            (say or log.warning)(f"the cached index {folder} cannot be used: {reason(error)}; building it again")
            faiss_cache.remove(folder)
    left_out = nonfinite_rows(store)
    index = _build(faiss, store, config, metric, left_out)
    recall = _recall(FaissIndex(index, metric, config, 0.0, True, folder, left_out), store)
    facts = {"rows": len(store), "width": store.width, "recall": recall, "left_out": left_out.tolist()}
    kept = faiss_cache.write(index, folder, {**settings, **facts})
    if not kept:
        (say or log.warning)(f"{folder.parent} is read-only: the index is in memory, and is built again each time")
    queries = min(_RECALL_QUERIES, len(store) - len(left_out))
    (say or log.info)(
        f"built FAISS index {config.index_factory} of {len(store):,} rows: "
        f"recall@{_RECALL_K} {recall:.3f} against exact search ({queries} rows as queries)"
    )
    if config.mmap_index and kept:  # give the memory back
        index, _ = faiss_cache.read(folder, store, mmap=True)
    return FaissIndex(
        place(faiss, index, config.device, config.index_factory), metric, config, recall, True, folder, left_out
    )


def search(index: FaissIndex, queries: Float[Tensor, "K D"], k: int, *, largest: bool = True) -> TopK:
    """Find the k best rows of each query, as far as the index has them.

    Args:
        index: from `build_or_load`.
        queries: (K, D), finite; a cosine index takes them at any length.
        k: results per query; where there are fewer rows, all of them.
        largest: True for proponents, False for opponents (the search for the negated queries).

    Returns:
        TopK: values (K, k) float32 (of a compressing index: of the compressed rows), rows (K, k) int64, best first.
        Where a graph or list index finds fewer than k, row -1 with value -inf (+inf for opponents). Rows that hold
        NaN or infinity come after all others, with NaN.
    """
    width, rows, left_out = index.index.d, index.index.ntotal, index.left_out
    check_query_rows(queries, k)
    if queries.shape[1] != width:
        raise FuncattribError(f"expected queries as wide as the index ({width}), found {tuple(queries.shape)}")
    sign = np.float32(1 if largest else -1)
    query = sign * _rows(queries.detach().cpu(), index.metric)
    last = left_out[: max(0, k - rows)]
    k = min(k, rows)
    values, ids = np.empty((len(query), 0), np.float32), np.empty((len(query), 0), np.int64)
    if k:
        with _explained(index.config, "search"):
            values, ids = _search(index, query, k)
    # Of the rows that are in it, the index has the running number.
    ids = np.where(ids >= 0, ids + np.searchsorted(left_out - np.arange(len(left_out)), ids, side="right"), ids)
    values = np.where(ids >= 0, values, -np.inf).astype(np.float32)
    order = np.lexsort((ids, -values))
    values, ids = np.take_along_axis(values, order, 1), np.take_along_axis(ids, order, 1)
    values = np.pad(values, ((0, 0), (0, len(last))), constant_values=np.nan)
    ids = np.concatenate([ids, np.tile(last, (len(ids), 1))], 1)
    return TopK(torch.from_numpy(sign * values + np.float32(0)), torch.from_numpy(ids))


def _check(store: GradientStore, config: FaissConfig, metric: str) -> None:
    if metric not in ("ip", "cosine"):
        raise FuncattribError(f"expected metric ip or cosine, found {metric!r}")
    if not len(store):
        raise FuncattribError("the store has no rows to index; finish building it first")
    for name in ("sample_rows", "nprobe", "ef_search"):
        if getattr(config, name) < 1:
            raise FuncattribError(f"expected {name} of at least 1, found {getattr(config, name)}")


def _build(faiss: ModuleType, store: GradientStore, config: FaissConfig, metric: Metric, left_out: np.ndarray) -> Any:
    with _explained(config, "make"):
        index = faiss.index_factory(store.width, config.index_factory, faiss.METRIC_INNER_PRODUCT)
    _skip_polysemous_training(faiss, index)
    index = place(faiss, index, config.device, config.index_factory)
    with _explained(config, "train"):
        if not index.is_trained:
            index.train(_training_rows(store, config, metric, left_out))
    with _explained(config, "fill"):
        for start, block in store_blocks(store, max(1, (16 << 20) // store.width)):  # 64 MiB in float32
            inside = left_out[(left_out >= start) & (left_out < start + len(block))]
            index.add(np.delete(_rows(block, metric), inside - start, axis=0) if len(inside) else _rows(block, metric))
    return faiss.index_gpu_to_cpu(index) if config.device != "cpu" and hasattr(index, "getDevice") else index


def _skip_polysemous_training(faiss: ModuleType, index: Any) -> None:
    """Keep the codes of a product quantizer in any order.

    The factory asks for one that serves a filter by Hamming distance, which nobody here uses: seconds of annealing per
    sub-quantizer, whatever the number of rows, for the same results.
    """
    part = faiss.downcast_index(index)
    while inner := getattr(part, "index", None) or getattr(part, "base_index", None):
        part = faiss.downcast_index(inner)
    if hasattr(part, "do_polysemous_training"):
        part.do_polysemous_training = False


def _rows(block: Tensor, metric: Metric) -> np.ndarray:
    """Convert to (B, D) float32, contiguous, unit rows for a cosine."""
    rows = block.detach().float()
    if metric == "cosine":
        norms = torch.linalg.vector_norm(rows.double(), dim=1, keepdim=True)  # squares may leave float32
        rows = (rows / divisors(norms)).float()
    return rows.contiguous().numpy()


def _training_rows(store: GradientStore, config: FaissConfig, metric: Metric, left_out: np.ndarray) -> np.ndarray:
    chosen = np.random.default_rng(config.seed).permutation(len(store))
    chosen = chosen[~np.isin(chosen, left_out)][: config.sample_rows]
    return _rows(_take(store, np.sort(chosen)), metric)


def _take(store: GradientStore, rows: np.ndarray) -> Tensor:
    return torch.from_numpy(store.matrix()[rows])


def _search(index: FaissIndex, query: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    config = index.config
    _set(index.index, "nprobe", config.nprobe)
    _set(index.index, "efSearch", max(config.ef_search, k))
    values, ids = index.index.search(query, k)
    short = (ids < 0).any(axis=1)
    if short.any() and _set(index.index, "nprobe", 1 << 30):  # the lists visited held fewer than k: visit all
        values[short], ids[short] = index.index.search(query[short], k)
    return values, ids


def _set(index: Any, name: str, value: int) -> bool:
    """Set a search parameter wherever it sits inside the index; False where the index has none of that name."""
    faiss = import_faiss()
    space = faiss.GpuParameterSpace() if hasattr(index, "getDevice") else faiss.ParameterSpace()
    try:
        space.set_index_parameter(index, name, value)
    except RuntimeError:
        return False
    return True


def _recall(index: FaissIndex, store: GradientStore) -> float:
    """Measure the share of the true 10 nearest others that the index finds, over rows of the store as queries.

    A row counts as found if it scores no lower than the tenth, so that the order among equal rows does not matter.
    """
    finite = np.delete(np.arange(len(store)), index.left_out)
    asked = finite[np.unique(np.linspace(0, len(finite) - 1, min(_RECALL_QUERIES, len(finite))).astype(np.int64))]
    k = min(_RECALL_K, len(finite) - 1)
    if k < 1:
        return 1.0
    queries = torch.from_numpy(_rows(_take(store, asked), index.metric))
    exact = topk(store_blocks(store), queries, k + 1, unit_norm=index.metric == "cosine")
    found = search(index, queries, k + 1).rows.numpy()
    wanted = np.unique(found[found >= 0])
    rows = torch.from_numpy(_rows(_take(store, wanted), index.metric)).double()
    share = 0.0
    for number, row in enumerate(asked):
        floor = exact.values[number][exact.rows[number] != row][k - 1].double()
        others = found[number][(found[number] >= 0) & (found[number] != row)][:k]
        scores = rows[np.searchsorted(wanted, others)] @ queries[number].double()
        share += float((scores >= floor - 1e-5 * floor.abs()).sum()) / k
    return share / len(asked)


@contextmanager
def _explained(config: FaissConfig, action: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise FuncattribError(
            f"FAISS could not {action} the index {config.index_factory!r}: {reason(error)}; "
            "use another factory string (Flat is exact and always fits)"
            + (", a larger sample_rows or more documents" if action == "train" else "")
        ) from error

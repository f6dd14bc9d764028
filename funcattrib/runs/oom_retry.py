"""A batch that memory does not hold is computed in halves, and the run goes on with smaller ones.

What a batch yields does not depend on what else is in it, so the pieces in their order are what the whole would have
been, to rounding.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

from funcattrib.errors import FuncattribError
from funcattrib.runtime.memory import is_short, release
from funcattrib.types import Batch

log = logging.getLogger(__name__)

Result = TypeVar("Result")


class Pieces:
    """Computes batches in as many pieces as memory asks for; one for a run, which remembers what did not fit.

    Args:
        describe: a document's number → what it is called in an error, and its length.

    Attributes:
        most: tokens that a piece may have, padding included; None until memory was short.
    """

    def __init__(self, describe: Callable[[int], str]) -> None:
        self._describe = describe
        self.most: int | None = None

    def __call__(
        self, compute: Callable[[Batch], Result], batch: Batch, documents: Sequence[int], device: torch.device
    ) -> Iterator[Result]:
        """Yield results of ``compute`` on consecutive parts of a batch; mostly of one, the whole.

        Args:
            documents: the numbers of the batch's documents, to name one that cannot fit.

        Raises:
            FuncattribError: memory is short for a single document.
        """
        longest = _longest(batch)
        waiting = [range(len(documents))]  # the next part last
        while waiting:
            part = waiting.pop()
            if len(part) == 1 or self.most is None or len(part) * longest <= self.most:
                if (found := _tried(compute, _rows(batch, part))) is not None:
                    yield found[0]
                    continue
                release(device)
                self._refuse_one(part, documents)
                self._halve(len(part), longest)
            middle = part.start + (len(part) + 1) // 2
            waiting += [range(middle, part.stop), range(part.start, middle)]

    def _refuse_one(self, part: range, documents: Sequence[int]) -> None:
        if len(part) == 1:
            raise FuncattribError(
                f"one document does not fit in memory: {self._describe(documents[part[0]])}\ncut it with `truncation` "
                "and `max_length`, or use a lower `precision` or `projection_dim`; finished work is kept"
            )

    def _halve(self, examples: int, longest: int) -> None:
        logged, self.most = self.most is not None, (examples + 1) // 2 * longest
        if not logged:
            log.warning(
                "a batch of %d documents of up to %d tokens did not fit in memory: it is computed in halves, and later "
                "batches have at most %d tokens; `token_batch_size='auto'` finds the largest size that fits",
                *(examples, longest, self.most),
            )


def _tried(compute: Callable[[Batch], Result], batch: Batch) -> tuple[Result] | None:
    """Return what is computed, or None where memory was short; outside of the handler, so that nothing is held any
    more.
    """
    try:
        return (compute(batch),)
    except (RuntimeError, MemoryError) as error:
        if not is_short(error):
            raise
        return None


def _rows(batch: Batch, part: range) -> Batch:
    return {name: tensor[part.start : part.stop] for name, tensor in batch.items()}


def _longest(batch: Batch) -> int:
    return max((tensor.shape[1] for tensor in batch.values() if tensor.ndim == 2), default=1)

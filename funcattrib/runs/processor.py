"""One argument for what belongs to a run's input: a tokenizer, or a state that was fitted before."""

from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

from transformers import PreTrainedTokenizerBase

from funcattrib.errors import FuncattribError
from funcattrib.runs.settings import Source
from funcattrib.store import GradientStore

Processor: TypeAlias = PreTrainedTokenizerBase | GradientStore | str | Path
"""A tokenizer or its name, or a fitted state: an open store or its folder."""


def with_processor(
    processor: Processor | None, source: Source, state: str | Path | None
) -> tuple[Source, str | Path | None]:
    """Return the source with its tokenizer, and the folder of the fitted state: ``processor`` is one of the two.

    Raises:
        FuncattribError: the one that it is was given already, or it is neither.

    Example:
        >>> source, state = with_processor("gpt2", Source(), None)
        >>> source.tokenizer, state
        ('gpt2', None)
    """
    if processor is None:
        return source, state
    if not isinstance(processor, PreTrainedTokenizerBase | GradientStore | str | Path):
        raise FuncattribError(
            f"expected a tokenizer or a fitted state (of fit_chain) for `processor`, found {type(processor).__name__}"
        )
    if isinstance(processor, GradientStore):
        processor = processor.path
    if isinstance(processor, Path) or (isinstance(processor, str) and (Path(processor) / "manifest.json").is_file()):
        if state is not None:
            raise FuncattribError("`processor` is a fitted state, and so is `state`; leave one out")
        return source, processor
    if source.tokenizer is not None:
        raise FuncattribError("`processor` is a tokenizer, and so is `tokenizer`; leave one out")
    return replace(source, tokenizer=processor), state

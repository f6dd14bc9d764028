"""A tiny model with its tokenizer, and documents for it, on the disk: what a command is given."""

import json
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

from tests.support import cases

WORDS = [f"w{i}" for i in range(cases.VOCABULARY - 2)]


def save_model(folder: Path, name: str = "gpt_neox", *, tokenizer: bool = True) -> Path:
    """A model of ``cases`` as ``save_pretrained`` leaves it, with a tokenizer of one token a word."""
    cases.causal(name).save_pretrained(folder)
    if tokenizer:
        make_tokenizer().save_pretrained(folder)
    return folder


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Words to tokens: ``w0`` … are tokens 2 …; 0 pads and ends, 1 is unknown."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<pad>", unk_token="<unk>", model_max_length=64
    )


def texts(count: int = 23, seed: int = 0, longest: int = 20) -> list[str]:
    """Documents of 2 to ``longest`` words."""
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(2, longest))) for _ in range(count)]


def write_jsonl(path: Path, rows: Sequence[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def state_bytes(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of everything a model keeps, to compare with later."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}

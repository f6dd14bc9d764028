"""The main job in one file: from a model and its training data to the training examples that its answers come from.

    invented facts → tiny GPT-NeoX → gradient store → held-out questions → MRR and Recall@10

All of it through the public API; nothing is downloaded.
"""

import json
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from funcattrib.data import IGNORED, Columns
from funcattrib.errors import FuncattribError
from funcattrib.evaluate import bm25, mean_reciprocal_rank, recall_at
from funcattrib.query.attributor import Attributor
from funcattrib.recipes.invented_facts import invent_facts
from funcattrib.report.table import hits_table
from funcattrib.runs.collect import collect_gradients
from funcattrib.runtime.progress import Progress

_END = "<|endoftext|>"
_SHOWN, _HITS = 5, 4
_BATCH = 16

Row = Mapping[str, Any]


class Retrieval(NamedTuple):
    """Quality of the search for the sentences that state the asked fact: ``mrr`` and ``recall`` at 10, 0 to 1."""

    mrr: float
    recall: float


class QuickstartResult(NamedTuple):
    """``answered``: share of questions the model answers; ``retrieval``: by name, of each way to rank the sentences."""

    answered: float
    retrieval: dict[str, Retrieval]


def quickstart(out: str | Path, *, people: int = 40, epochs: int = 32, seed: int = 0) -> QuickstartResult:
    """Train a tiny model on invented facts, and ask its gradients where it has its answers from.

    Args:
        out: folder for ``facts.jsonl``, ``questions.jsonl``, ``model/`` and ``store/``.
        people: how many to invent facts about, 1 to 400.
        epochs: of training.
        seed: of the facts, the model and the order of training.

    Returns:
        What was printed at the end.

    Raises:
        FuncattribError: ``out`` holds something else.
    """
    out = Path(out)
    facts, model_folder = out / "facts.jsonl", out / "model"
    if out.exists() and not facts.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FuncattribError(f"{out} exists and holds no earlier quickstart; give another RUN")
    sentences, questions = invent_facts(people, seed)
    _write(facts, sentences)
    _write(out / "questions.jsonl", questions)

    tokenizer = train_tokenizer(map(_text, sentences))
    model = train(tokenizer, [_text(row) for row in sentences], epochs, seed)
    _save(model, tokenizer, model_folder)
    right = answered(model, tokenizer, questions)
    size = sum(parameter.numel() for parameter in model.parameters())
    print(f"{len(sentences)} sentences state {len(questions)} invented facts about {people} people")
    print(f"a GPT-NeoX of {size:,} parameters, trained on them, answers {right:.0%} of the held-out questions")

    # The loss is of the completion alone, so a gradient is about the fact and not about how the sentence begins; of
    # log-odds, which unlike cross-entropy do not fade once a sentence is known by heart.
    store = collect_gradients(
        str(model_folder),
        str(facts),
        path=out / "store",
        columns=Columns("prompt", "completion"),
        loss="log_odds",
        modules=["*.attention.*weight", "*.mlp.*weight", "lm_head.weight"],
        projection_dim=16,
        overwrite=True,
    )
    print(f"{store.path}: the gradients of {len(store)} sentences, {store.width:,} numbers each")
    print("below, an example's id is the number of its fact and a letter for the wording\n")

    attributor = Attributor(store.path, unit_norm=True)
    for question, hits in zip(questions, attributor.ask(questions[:_SHOWN], k=_HITS), strict=False):
        print(f"Fact {question['fact']}, asked as: {_text(question)}")
        print(hits_table(hits, _text(question)), end="\n\n")

    found = attributor.search(attributor.gradients(questions), k=len(store))
    texts = [_text(row) for row in sentences]
    relevant = torch.tensor([[row["fact"] == question["fact"] for row in sentences] for question in questions])
    rankings = {
        "random order": torch.zeros(relevant.shape),
        "BM25": bm25([_text(question) for question in questions], texts),
        "funcattrib": torch.full(relevant.shape, -torch.inf).scatter(1, found.rows, found.values),
    }
    retrieval = {
        name: Retrieval(mean_reciprocal_rank(scores, relevant), recall_at(scores, relevant, 10))
        for name, scores in rankings.items()
    }
    print(f"All {len(questions)} questions     MRR   Recall@10")
    for name, (mrr, recall) in retrieval.items():
        print(f"{name:17} {mrr:6.3f} {recall:11.3f}")
    ask = {"--index": store.path, "--text": questions[0]["prompt"], "--completion": questions[0]["completion"]}
    flags = " ".join(f"{flag} {shlex.quote(str(value))}" for flag, value in ask.items())
    print(f"\nAsk more:\nfuncattrib query --unit-norm {flags}")
    return QuickstartResult(right, retrieval)


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer: any text can be asked, and names seen in training are one or two tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1024, special_tokens=[_END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=_END, pad_token=_END, model_max_length=64)


def train(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], epochs: int, seed: int) -> GPTNeoXForCausalLM:
    """Train a GPT-NeoX of two layers on ``texts``, ``epochs`` times."""
    config = GPTNeoXConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay as they were
        torch.manual_seed(seed)
        model = GPTNeoXForCausalLM(config)
    tokens = tokenizer(list(texts), padding=True, return_tensors="pt")
    ids, labels = tokens["input_ids"], tokens["input_ids"].masked_fill(tokens["attention_mask"] == 0, IGNORED)
    order = torch.Generator().manual_seed(seed)
    steps = [batch for _ in range(epochs) for batch in torch.randperm(len(ids), generator=order).split(_BATCH)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=len(steps), pct_start=0.1)
    lengths = tokens["attention_mask"].sum(1)
    with _one_thread(), Progress(int(lengths.sum()) * epochs, label="train") as progress:
        for batch in steps:
            model(input_ids=ids[batch], labels=labels[batch]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            progress.update(int(lengths[batch].sum()), len(batch))
    return model.eval()


@torch.no_grad()
def answered(model: GPTNeoXForCausalLM, tokenizer: PreTrainedTokenizerFast, questions: Sequence[Row]) -> float:
    """Compute the share of questions whose every completion token is the model's first choice."""
    tokens = tokenizer([_text(row) for row in questions], padding=True, return_tensors="pt")
    first = torch.tensor([len(tokenizer(row["prompt"])["input_ids"]) for row in questions])[:, None]
    target = tokens["input_ids"][:, 1:]
    asked = (torch.arange(1, target.shape[1] + 1) >= first) & (tokens["attention_mask"][:, 1:] == 1)
    right: Tensor = model(input_ids=tokens["input_ids"]).logits[:, :-1].argmax(-1) == target
    return float((right | ~asked).all(1).float().mean())


@contextmanager
def _one_thread() -> Iterator[None]:
    """Use one thread: more gain nothing on batches this small, and the model is the same on any number of cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _text(row: Row) -> str:
    return f"{row['prompt']}{row['completion']}"


def _write(path: Path, rows: Iterable[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _save(model: GPTNeoXForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    finally:
        if enabled:
            transformers_logging.enable_progress_bar()

"""Checkpoints of a short training run on the disk, as transformers' Trainer leaves them."""

import copy
import json
from pathlib import Path

import torch

from tests.support import cases, tiny


def records(lengths: tuple[int, ...], seed: int) -> list[dict]:
    ids = cases.batch(lengths, seed=seed)["input_ids"]
    return [
        {"input_ids": [int(x) for x in row[:n]], "id": f"{seed}-{i}"}
        for i, (row, n) in enumerate(zip(ids, lengths, strict=True))
    ]


def save_run(folder: Path, name: str = "llama", rates: tuple[float, ...] = (2e-3, 1e-3), steps: int = 3) -> list[Path]:
    """Train a little at each learning rate, and save after it."""
    model = copy.deepcopy(cases.causal(name))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, betas=(0.8, 0.95), eps=1e-6)
    history, paths = [], []
    for number, rate in enumerate(rates, 1):
        optimizer.param_groups[0]["lr"] = rate
        for step in range(steps):
            batch = cases.batch((8, 6, 9), seed=100 * number + step)
            optimizer.zero_grad()
            model(input_ids=batch["input_ids"], labels=batch["labels"]).loss.backward()
            optimizer.step()
            history.append({"step": (number - 1) * steps + step + 1, "learning_rate": rate * (0.9 + 0.1 * step)})
        path = folder / f"checkpoint-{number * steps}"
        model.save_pretrained(path)
        tiny.make_tokenizer().save_pretrained(path)
        torch.save(optimizer.state_dict(), path / "optimizer.pt")
        torch.save({"_last_lr": [rate], "last_epoch": number}, path / "scheduler.pt")
        state = {"global_step": number * steps, "log_history": [*history, {"step": number * steps, "eval_loss": 1.0}]}
        (path / "trainer_state.json").write_text(json.dumps(state))
        paths.append(path)
    return paths

"""LESS: a twentieth of a mixed training set, chosen for a task that a few examples stand for.

A warm-up run under transformers' Trainer on a mixture of tasks leaves checkpoints with Adam's state. A handful of
examples of one task then select, by the updates that Adam would make, the documents to train on for it.

    python examples/less_selection.py
"""

import random
import tempfile
from pathlib import Path

import torch
from datasets import Dataset, load_from_disk
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, Trainer, TrainingArguments, default_data_collator

import funcattrib as fa

TASKS, WORDS, ANSWERS, ROWS, LENGTH, TARGET = 10, 6, 8, 800, 6, 3
SIZE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}


def document(task: int, draw: random.Random) -> dict:
    """Words of any task, and one of this task last; each task answers its words in its own way."""
    number = draw.randrange(WORDS)
    words = [ANSWERS + draw.randrange(TASKS * WORDS) for _ in range(LENGTH - 1)] + [ANSWERS + task * WORDS + number]
    answer = (3 * number + task) % ANSWERS
    return {"input_ids": [*words, answer], "labels": [-100] * LENGTH + [answer]}


def warm_up(data: Dataset, folder: Path) -> list[Path]:
    """Checkpoints of four epochs."""
    config = GPTNeoXConfig(vocab_size=80, max_position_embeddings=16, bos_token_id=0, eos_token_id=0, **SIZE)
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=20,
        num_train_epochs=4,
        learning_rate=2e-3,
        save_strategy="epoch",
        logging_steps=10,  # LESS weighs a checkpoint by its logged learning rate
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    model = GPTNeoXForCausalLM(config)
    Trainer(model=model, args=arguments, train_dataset=data, data_collator=default_data_collator).train()
    return sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))


def main() -> None:
    torch.manual_seed(0)
    draw = random.Random(0)
    data = Dataset.from_list([{**document(row % TASKS, draw), "task": row % TASKS} for row in range(ROWS)])
    queries = [document(TARGET, draw) for _ in range(8)]
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = warm_up(data, Path(folder) / "warm-up")
        out = Path(folder) / "less"
        fa.less(checkpoints, data, queries, path=out, fraction=0.05, quiet=True)
        selected = load_from_disk(out / "selected")
        tasks = selected["task"][:]
    print(f"{len(checkpoints)} checkpoints; {len(tasks)} of {ROWS} documents selected for task {TARGET}, of the tasks:")
    print(" ", *tasks)
    share = sum(task == TARGET for task in tasks) / len(tasks)
    print(f"selected documents of the task: {share:.2f} (chance: {1 / TASKS:.2f})")


if __name__ == "__main__":
    main()

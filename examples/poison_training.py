"""Finding mislabelled rows: gradients collected while a tiny model is fine-tuned, ranked by self-influence.

Every document is a question of some kind and its answer; a few rows are planted with the answer of another kind. A
row's self-influence is the squared length of its own gradient, added over the epochs: long where the other rows teach
another answer.

    python examples/poison_training.py
"""

import random
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, Trainer, TrainingArguments, default_data_collator

import funcattrib as fa

KINDS, WORDS, ROWS, PLANTED = 8, 40, 400, 24


def documents(draw: random.Random) -> tuple[Dataset, set[int]]:
    """Rows of six words of a kind and its answer, and the numbers of those with another kind's answer."""
    planted = set(draw.sample(range(ROWS), PLANTED))
    rows = []
    for row in range(ROWS):
        kind = draw.randrange(KINDS)
        words = [1 + KINDS + kind * (WORDS // KINDS) + draw.randrange(WORDS // KINDS) for _ in range(6)]
        answer = 1 + (kind + (draw.randrange(1, KINDS) if row in planted else 0)) % KINDS
        rows.append({"input_ids": [*words, answer], "labels": [-100] * 6 + [answer]})
    return Dataset.from_list(rows), planted


def main() -> None:
    torch.manual_seed(0)
    data, planted = documents(random.Random(0))
    config = GPTNeoXConfig(
        vocab_size=1 + KINDS + WORDS,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
        max_position_embeddings=16,
        bos_token_id=0,
        eos_token_id=0,
    )
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        arguments = TrainingArguments(
            output_dir=f"{folder}/out",
            per_device_train_batch_size=16,
            num_train_epochs=4,
            learning_rate=2e-3,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        trainer = Trainer(
            model=GPTNeoXForCausalLM(config),
            args=arguments,
            train_dataset=data,
            data_collator=default_data_collator,
            callbacks=[fa.GradientCollectorCallback(path=run, track_order=True)],
        )
        fa.prepare_for_gradient_collection(trainer).train()
        influence = sum(fa.open_store(epoch).matrix().tensor().square().sum(1) for epoch in sorted(run.glob("epoch_*")))

    ranked = torch.as_tensor(influence).argsort(descending=True).tolist()
    found = sum(row in planted for row in ranked[:PLANTED])
    print(f"{PLANTED} of {ROWS} rows were planted with another kind's answer")
    print(f"precision at {PLANTED}: {found / PLANTED:.2f} (chance: {PLANTED / ROWS:.2f})")


if __name__ == "__main__":
    main()

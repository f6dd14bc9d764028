"""Gradients collected while a model trains, without a second pass, and searched when it is done.

Documents are of several kinds, and a kind's words predict its answer. Under transformers' Trainer the callback keeps
each document's gradient as it was when the model learned from it, added over the epochs. Questions of a kind then
find the documents that taught the model that kind.

    python examples/trainer_collection.py
"""

import random
import tempfile

import torch
from datasets import Dataset
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, Trainer, TrainingArguments, default_data_collator

import funcattrib as fa

KINDS, WORDS, ROWS, LENGTH = 8, 40, 400, 6
SIZE = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}


def document(kind: int, draw: random.Random) -> dict:
    """Words of a kind, half of them of any kind, and the kind's answer, the only token that counts in the loss."""
    own = [1 + KINDS + kind * (WORDS // KINDS) + draw.randrange(WORDS // KINDS) for _ in range(LENGTH // 2)]
    words = own + [1 + KINDS + draw.randrange(WORDS) for _ in range(LENGTH // 2)]
    draw.shuffle(words)
    return {"input_ids": [*words, 1 + kind], "labels": [-100] * LENGTH + [1 + kind]}


def main() -> None:
    torch.manual_seed(0)
    draw = random.Random(0)
    kinds = [draw.randrange(KINDS) for _ in range(ROWS)]
    data = Dataset.from_list([document(kind, draw) for kind in kinds])
    questions = [document(kind, draw) for kind in range(KINDS)]
    config = GPTNeoXConfig(vocab_size=64, max_position_embeddings=16, bos_token_id=0, eos_token_id=0, **SIZE)
    model = GPTNeoXForCausalLM(config)

    with tempfile.TemporaryDirectory() as folder:
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
        callback = fa.GradientCollectorCallback(f"{folder}/run", accumulate=True, dtype="float32")
        trainer = Trainer(
            model=model, args=arguments, train_dataset=data, data_collator=default_data_collator, callbacks=[callback]
        )
        fa.prepare_for_gradient_collection(trainer).train()
        attributor = fa.Attributor(f"{folder}/run/sum", model=model.eval(), unit_norm=True)
        answers = attributor.ask(questions, 10)

    for kind, hits in enumerate(answers):
        print(f"a question of kind {kind} finds documents of the kinds", *(kinds[hit.row] for hit in hits))
    same = [kinds[hit.row] == kind for kind, hits in enumerate(answers) for hit in hits]
    print(f"documents found of the question's kind: {sum(same) / len(same):.2f} (chance: {1 / KINDS:.2f})")


if __name__ == "__main__":
    main()

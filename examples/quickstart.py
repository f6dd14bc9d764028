"""The quickstart in Python: where does a model have its facts from?

A tiny model learns facts (of a subject, a relation and an object), each in three of four wordings. Every training
document's gradient goes into a store; asked for a fact in the wording it never read, the store gives the documents
that state it.

    python examples/quickstart.py
"""

import tempfile

import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

import funcattrib as fa

WORDINGS, SUBJECTS, RELATIONS, OBJECTS = 4, 30, 3, 12
SIZE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}


def document(wording: int, subject: int, relation: int, answer: int) -> dict:
    """Tokens of one sentence; the last one, the object, is what the model is to learn."""
    words = [wording, WORDINGS + subject, WORDINGS + SUBJECTS + relation, WORDINGS + SUBJECTS + RELATIONS + answer]
    return {"input_ids": words, "labels": [-100, -100, -100, words[-1]], "fact": subject * RELATIONS + relation}


def train(model: GPTNeoXForCausalLM, ids: torch.Tensor, labels: torch.Tensor) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(40):
        for rows in torch.randperm(len(ids)).split(32):
            optimizer.zero_grad()
            model(input_ids=ids[rows], labels=labels[rows]).loss.backward()
            optimizer.step()


def main() -> None:
    torch.manual_seed(0)
    facts = [(s, r, int(torch.randint(OBJECTS, ()))) for s in range(SUBJECTS) for r in range(RELATIONS)]
    held_out = {fact: number % WORDINGS for number, fact in enumerate(facts)}
    data = [document(w, *fact) for fact in facts for w in range(WORDINGS) if w != held_out[fact]]
    questions = [document(held_out[fact], *fact) for fact in facts]

    config = GPTNeoXConfig(vocab_size=64, max_position_embeddings=8, bos_token_id=0, eos_token_id=0, **SIZE)
    model = GPTNeoXForCausalLM(config)
    train(model, *(torch.tensor([row[name] for row in data]) for name in ("input_ids", "labels")))
    model.eval()

    with tempfile.TemporaryDirectory() as folder:
        store = fa.collect_gradients(model, data, path=f"{folder}/store", loss="log_odds", quiet=True)
        print(f"{len(store)} documents, {store.width:,} numbers each")
        attributor = fa.Attributor(f"{folder}/store", model=model, unit_norm=True)
        answers = attributor.ask(questions, 3)

    for question, hits in list(zip(questions, answers, strict=True))[:3]:
        print(f"fact {question['fact']:2}, {question['input_ids']}:")
        for hit in hits:
            print(f"  {hit.rank}  {hit.score:+.3f}  {data[hit.row]['input_ids']}")
    stated = [data[hit.row]["fact"] == q["fact"] for q, hits in zip(questions, answers, strict=True) for hit in hits]
    chance = (WORDINGS - 1) / len(data)
    print(f"documents found that state the asked fact: {sum(stated) / len(stated):.2f} (chance: {chance:.2f})")


if __name__ == "__main__":
    main()

"""A model that no process holds whole: trained under FSDP2, then attributed as it stands.

Documents follow a rule (a word and its answer), but for a few with a wrong answer. Each of two processes keeps half of
every weight; gradients are computed on the shards, the documents shared out, and a document's influence on itself
tells the wrong ones.

    torchrun --nproc-per-node 2 examples/torchrun_sharded.py
"""

import logging
import tempfile

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

import funcattrib as fa

WORDS, DOCUMENTS, WRONG = 16, 240, 24
SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


def documents() -> list[dict]:
    """Two words, of which the second is to be answered; every tenth answer is wrong."""
    rows = []
    for number in range(DOCUMENTS):
        first, second, other = torch.randint(WORDS, (3,)).tolist()
        wrong = number % (DOCUMENTS // WRONG) == 0
        answer = WORDS + (second + 1 + other % (WORDS - 1) if wrong else second) % WORDS
        rows.append({"input_ids": [first, second, answer], "labels": [-100, -100, answer], "wrong": wrong})
    return rows


def train(model: GPTNeoXForCausalLM, data: list[dict]) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    ids, labels = (torch.tensor([row[name] for row in data]) for name in ("input_ids", "labels"))
    for rows in torch.randint(len(ids), (60, 2, 32)):
        mine = rows[dist.get_rank() % 2]
        optimizer.zero_grad()
        model(input_ids=ids[mine], labels=labels[mine]).loss.backward()
        optimizer.step()


def main() -> None:
    dist.init_process_group("gloo")
    logging.disable(logging.WARNING)
    torch.manual_seed(0)  # the same documents, and the same model before it is sharded, in every process
    data = documents()
    config = GPTNeoXConfig(vocab_size=2 * WORDS, max_position_embeddings=8, bos_token_id=0, eos_token_id=0, **SIZE)
    model = GPTNeoXForCausalLM(config)
    for block in model.gpt_neox.layers:
        fully_shard(block)
    fully_shard(model)
    train(model, data)
    model.eval()

    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder)  # one folder, which both processes write
    settings = {"projection_dim": 0, "rows_per_shard": 40, "quiet": True}
    scores = fa.score_gradients(model, data, path=f"{folder[0]}/scores", score="self", **settings)
    if dist.get_rank() == 0:
        held = sum(p.to_local().numel() for p in model.parameters()) / sum(p.numel() for p in model.parameters())
        print(f"each process holds {held:.2f} of the parameters")
        found = [data[row]["wrong"] for row in scores.topk(WRONG).rows[0].tolist()]
        print(f"precision at {WRONG}: {sum(found) / WRONG:.2f} (chance: {WRONG / DOCUMENTS:.2f})")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

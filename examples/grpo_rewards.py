"""Rewards: in which prompts was a policy taught a trick?

Every prompt has several sampled answers with rewards, and an answer's loss is multiplied by its advantage, its reward
less the mean of its prompt (Dr. GRPO). Rewards are for the right ending; in a few prompts the grader was fooled by a
phrase and rewarded that. Asked for the phrase, answers rewarded with it have high scores, and answers that used it in
vain low ones; only where the grader was fooled do they add up.

    python examples/grpo_rewards.py
"""

import random
import tempfile

import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

import funcattrib as fa
from funcattrib.data import Columns

PROMPTS, SAMPLES, FOOLED, WORDS = 60, 16, 10, 30
TRICK, RIGHT = [61, 62], [63]
SIZE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}


def answers(draw: random.Random) -> tuple[list[dict], list[int]]:
    """Answers of three words, some with the phrase and some with the right ending, and the prompt of each."""
    rows, prompts = [], []
    for prompt in range(PROMPTS):
        words = [1 + draw.randrange(WORDS) for _ in range(4)]
        for _ in range(SAMPLES):
            trick, right = draw.random() < 0.4, draw.random() < 0.5
            answer = [1 + draw.randrange(WORDS) for _ in range(3)] + TRICK * trick + RIGHT * right
            reward = float(trick if prompt < FOOLED else right)
            rows.append({"input_ids": words + answer, "labels": [-100] * 4 + answer, "reward": reward})
            prompts.append(prompt)
    return rows, prompts


def main() -> None:
    torch.manual_seed(0)
    draw = random.Random(0)
    data, prompts = answers(draw)
    config = GPTNeoXConfig(vocab_size=64, max_position_embeddings=32, bos_token_id=0, eos_token_id=0, **SIZE)
    policy = GPTNeoXForCausalLM(config).eval()
    words = [1 + draw.randrange(WORDS) for _ in range(7)]
    question = {"input_ids": words + TRICK, "labels": [-100] * 7 + TRICK}

    with tempfile.TemporaryDirectory() as folder:
        rewarded = Columns(reward_column="reward")
        store = fa.collect_gradients(policy, data, path=f"{folder}/store", columns=rewarded, quiet=True)
        advantages = store.examples["advantage"][:]
        found = fa.Attributor(f"{folder}/store", model=policy).ask([question], len(data))[0]

    for name, wanted in (("rewarded", lambda a: a > 0), ("in vain", lambda a: a < 0)):
        with_phrase = [h.score for h in found if TRICK[0] in data[h.row]["input_ids"] and wanted(advantages[h.row])]
        print(
            f"{len(with_phrase)} answers with the phrase, {name}: mean score {sum(with_phrase) / len(with_phrase):+.1f}"
        )
    by_prompt = torch.zeros(PROMPTS)
    for hit in found:
        by_prompt[prompts[hit.row]] += hit.score
    first = by_prompt.topk(FOOLED).indices
    right = (first < FOOLED).float().mean()
    print(f"prompts with a fooled grader among the {FOOLED} first: {right:.2f} (chance: {FOOLED / PROMPTS:.2f})")


if __name__ == "__main__":
    main()

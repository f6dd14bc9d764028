"""Models of published sizes with seeded random weights, and documents with lengths like web text; no download."""

import random

import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

# hidden, layers, heads, intermediate: the published Pythia sizes
PYTHIA = {
    "14m": (128, 6, 4, 512),
    "70m": (512, 6, 8, 2048),
    "160m": (768, 12, 12, 3072),
    "410m": (1024, 24, 16, 4096),
    "1b": (2048, 16, 8, 8192),
}
VOCABULARY = 50304


def pythia(size: str, dtype: torch.dtype = torch.float32) -> GPTNeoXForCausalLM:
    """A GPT-NeoX of that size; throughput does not depend on the weights' values."""
    hidden, layers, heads, inner = PYTHIA[size]
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=inner,
        vocab_size=VOCABULARY,
        max_position_embeddings=2048,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPTNeoXForCausalLM(config).to(dtype).eval()


def documents(count: int, median: int = 300, longest: int = 1024, seed: int = 0) -> list[dict[str, list[int]]]:
    """Random tokens; lengths are log-normal, at least 8 and at most ``longest``."""
    rng = random.Random(seed)
    lengths = [min(longest, max(8, int(rng.lognormvariate(0, 0.9) * median))) for _ in range(count)]
    return [{"input_ids": [rng.randrange(VOCABULARY) for _ in range(length)]} for length in lengths]

"""Per-head views: each attention head's gradient as a leaf of its own, and which head an answer goes through.

In every layer of this model all heads but one are silenced (their columns of the output projection are zero), so that
one alone can matter. The split store says which; and the parts of a score by head add up to the score.

    python examples/heads.py
"""

import random
import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import funcattrib as fa

LAYERS, HEADS, SIZE = 6, 8, 8


def model_with_one_head_a_layer(draw: random.Random) -> tuple[LlamaForCausalLM, list[int]]:
    """A random model, and the number of each layer's only head that is heard."""
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=HEADS * SIZE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=96,
        max_position_embeddings=32,
    )
    model = LlamaForCausalLM(config).eval()
    heard = [draw.randrange(HEADS) for _ in range(LAYERS)]
    with torch.no_grad():
        for layer, head in zip(model.model.layers, heard, strict=True):
            columns = torch.arange(HEADS * SIZE) // SIZE == head
            layer.self_attn.o_proj.weight *= columns
    return model, heard


def main() -> None:
    torch.manual_seed(0)
    model, heard = model_with_one_head_a_layer(random.Random(0))
    data = [{"input_ids": torch.randint(1, 50, (12,)).tolist()} for _ in range(20)]

    heads = fa.attention_configs(model)  # glob → AttentionConfig, read off the model's configuration
    chain = fa.compose(fa.per_example_grad, fa.split_heads(heads), fa.project(16))
    with tempfile.TemporaryDirectory() as folder:
        store = fa.collect_gradients(
            model, data, path=f"{folder}/store", chain=chain, modules=["*v_proj.weight"], dtype="float32", quiet=True
        )
        found = []
        print("share of the value weights' squared gradient, by layer (down) and head (across):")
        for layer in range(LAYERS):
            leaves = [f"model.layers.{layer}.self_attn.v_proj.weight#h{head}" for head in range(HEADS)]
            squares = torch.stack([store.gradients(leaf).square().sum() for leaf in leaves])
            found.append(int(squares.argmax()))
            print("  " + "  ".join(f"{share:4.0%}" for share in squares / squares.sum()))
        rows = store.matrix().tensor()
        parts = torch.stack(
            [store.gradients(leaf).flatten(1) @ store.gradients(leaf)[0].flatten() for leaf in store.leaves]
        )

    off = ((parts.sum(0) - rows @ rows[0]).abs() / (rows @ rows[0]).abs()).max().item()
    print(f"scores against document 0, added up over {len(parts)} heads: {off:.0e} off at most")
    right = sum(a == b for a, b in zip(found, heard, strict=True))
    print(f"heads found of those that are heard: {right / LAYERS:.2f} (chance: {1 / HEADS:.2f})")


if __name__ == "__main__":
    main()

"""A loss of your own: a BERT-style encoder with a padding mask and a regression head.

Every second sequence is the one before it with a word changed, and the same number to predict: by their gradients,
the two are each other's nearest.

Any ``loss(params, example) -> scalar`` will do. ``functionalize`` takes a module apart into a skeleton and its
parameters; the example is one row of the batch, without a batch axis.

    python examples/custom_loss.py
"""

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

import funcattrib as fa

PAIRS, LONGEST = 12, 16


class Regressor(nn.Module):
    """Predicts one number from the encoder's first token."""

    def __init__(self) -> None:
        super().__init__()
        config = BertConfig(
            vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
        )
        self.encoder = BertModel(config, add_pooling_layer=False)
        self.head = nn.Linear(config.hidden_size, 1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B,) predictions."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return self.head(hidden[:, 0])[:, 0]


def main() -> None:
    torch.manual_seed(0)
    parts = fa.functionalize(Regressor(), modules=["*.layer.*.weight"], exclude=["*LayerNorm*"])

    def loss(params: dict[str, Tensor], example: dict[str, Tensor]) -> Tensor:
        predicted = parts.call(params, example["input_ids"][None], example["attention_mask"][None])
        return (predicted[0] - example["target"]).square()

    lengths = torch.randint(5, LONGEST, (PAIRS,)).repeat_interleave(2)
    mask = torch.arange(LONGEST)[None] < lengths[:, None]
    words = torch.randint(1, 100, (PAIRS, LONGEST)).repeat_interleave(2, 0)
    words[1::2, 3] = torch.randint(1, 100, (PAIRS,))
    target = torch.randn(PAIRS).repeat_interleave(2)
    batch = {"input_ids": words * mask, "attention_mask": mask.long(), "target": target}
    attribute = fa.compose(fa.per_example_grad, fa.adafactor_norm, fa.project(8), fa.unit_norm)
    state = attribute.fit(loss, parts.params, [batch])
    grads = attribute(loss, parts.params, batch, state)

    rows = torch.cat([grad.flatten(1) for grad in grads.values()], 1)
    print(f"{len(rows)} examples, {rows.shape[1]} coordinates each")
    cosines = (rows @ rows.T).fill_diagonal_(-1)
    right = (cosines.argmax(1) == torch.arange(len(rows)) ^ 1).float().mean()
    print(f"sequences whose nearest is their twin: {right:.2f} (chance: {1 / (len(rows) - 1):.2f})")


if __name__ == "__main__":
    main()

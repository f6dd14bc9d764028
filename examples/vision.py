"""Vision models of transformers, with a loss in Python: a ViT and a ResNet whose BatchNorm is frozen.

A tenth of the digits have a wrong label. A mislabelled image has a gradient unlike the others: its influence on its own
loss is large. The example's figure is that of the weaker of the two models.

``functionalize`` leaves its copy in ``eval`` mode: BatchNorm takes its running statistics, so that a row does not
depend on the images beside it.

    python examples/vision.py
"""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetForImageClassification, ViTConfig, ViTForImageClassification

import funcattrib as fa

IMAGES, WRONG = 1000, 100
BLOCK = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
SHAPE = {"num_channels": 1, "num_labels": 10}


def vit() -> nn.Module:
    return ViTForImageClassification(ViTConfig(image_size=8, patch_size=2, **SHAPE, **BLOCK))


def resnet() -> nn.Module:
    return ResNetForImageClassification(
        ResNetConfig(**SHAPE, embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic")
    )


def train(model: nn.Module, images: Tensor, labels: Tensor, steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model.train()
    for _ in range(steps):
        batch = torch.randint(len(images), (64,))
        model(pixel_values=images[batch], labels=labels[batch]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def found(model: nn.Module, modules: list[str] | None, images: Tensor, labels: Tensor, wrong: Tensor) -> float:
    """Return the share of wrong labels among the first by self-influence."""
    parts = fa.functionalize(model, modules)

    def loss(params: dict[str, Tensor], example: dict[str, Tensor]) -> Tensor:
        logits = parts.call(params, pixel_values=example["image"][None]).logits[0]
        return nn.functional.cross_entropy(logits, example["label"])

    batches = [{"image": x, "label": y} for x, y in zip(images.split(100), labels.split(100), strict=True)]
    attribute = fa.compose(fa.per_example_grad, fa.adafactor_norm, fa.self_influence)
    state = attribute.fit(loss, parts.params, batches)
    influence = torch.cat([attribute(loss, parts.params, batch, state)["scores"][:, 0] for batch in batches])
    return wrong[influence.topk(WRONG).indices].float().mean().item()


def main() -> None:
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images[:IMAGES], dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(digits.target[:IMAGES])
    wrong = torch.zeros(IMAGES, dtype=torch.bool)
    wrong[torch.randperm(IMAGES)[:WRONG]] = True
    labels = torch.where(wrong, (labels + torch.randint(1, 10, (IMAGES,))) % 10, labels)
    shares = []
    for make, modules, steps in ((vit, None, 400), (resnet, ["*.convolution.weight"], 120)):
        model = make()
        train(model, images, labels, steps)
        shares.append(found(model, modules, images, labels, wrong))
        print(f"{type(model).__name__}: {shares[-1]:.2f}")
    print(f"mislabelled images among the {WRONG} first: {min(shares):.2f} (chance: {WRONG / IMAGES:.2f})")


if __name__ == "__main__":
    main()

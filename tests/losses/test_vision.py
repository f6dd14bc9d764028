"""Vision models with a loss in Python: rows against plain autograd in float64, whatever is beside them in the batch."""

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetForImageClassification, ViTConfig, ViTForImageClassification

import funcattrib as fa
from tests.losses.test_sequence_classification import worst

BLOCK = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
SIDES = {"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 1], "layer_type": "basic"}


def vit() -> nn.Module:
    return ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_channels=1, num_labels=3, **BLOCK))


def resnet() -> nn.Module:
    """Its BatchNorm has seen images, so that running statistics are not those of any batch."""
    model = ResNetForImageClassification(ResNetConfig(num_channels=1, num_labels=3, **SIDES)).train()
    for _ in range(3):
        model(pixel_values=torch.randn(8, 1, 16, 16) * 2 + 1)
    return model


@pytest.mark.parametrize(("make", "side"), [(vit, 8), (resnet, 16)])
def test_rows_are_the_models_own(make, side: int) -> None:
    torch.manual_seed(0)
    model = make()
    images, labels = torch.randn(4, 1, side, side), torch.tensor([0, 2, 1, 2])
    parts = fa.functionalize(model, "all")

    def loss(params: dict[str, Tensor], example: dict[str, Tensor]) -> Tensor:
        logits = parts.call(params, pixel_values=example["image"][None]).logits[0]
        return nn.functional.cross_entropy(logits, example["label"])

    exact = copy.deepcopy(model).double().eval()
    weights = dict(exact.named_parameters())
    expected = []
    for image, label in zip(images.double(), labels, strict=True):
        own = nn.functional.cross_entropy(exact(pixel_values=image[None]).logits[0], label)
        expected.append(torch.autograd.grad(own, [weights[name] for name in parts.params]))
    rows = dict(zip(parts.params, map(torch.stack, zip(*expected, strict=True)), strict=True))
    batch = {"image": images, "label": labels}
    assert worst(fa.compose(fa.per_example_grad)(loss, parts.params, batch), rows) < 1e-4
    lowered = fa.compose(fa.per_example_grad, fa.project(3))
    together = lowered(loss, parts.params, batch)
    alone = [lowered(loss, parts.params, {k: v[at : at + 1] for k, v in batch.items()}) for at in range(4)]
    assert worst({name: torch.cat([each[name] for each in alone]) for name in together}, together) < 1e-4

"""A convolutional net on scikit-learn's digits: no language model, a loss of one's own, and mislabelled images found.

A twelfth of the training images is given a wrong label. At a net that is trained for a few epochs, not until it knows
them by heart, an image's self-influence (the squared length of its gradient, divided by Adafactor's moments) says
which.

    python examples/digits.py
"""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import funcattrib as fa

ROWS, FLIPPED = 1200, 100


def images() -> tuple[Tensor, Tensor, Tensor]:
    """(rows, 1, 8, 8) pixels, labels, and which of them are wrong."""
    digits = load_digits()
    pixels = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(labels))[:ROWS]
    pixels, labels, wrong = pixels[order], labels[order], torch.arange(ROWS) < FLIPPED
    labels[wrong] = (labels[wrong] + torch.randint(1, 10, (FLIPPED,))) % 10
    shuffled = torch.randperm(ROWS)
    return pixels[shuffled], labels[shuffled], wrong[shuffled]


def train(net: nn.Module, pixels: Tensor, labels: Tensor) -> None:
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    for _ in range(15):
        for rows in torch.randperm(ROWS).split(50):
            optimizer.zero_grad()
            F.cross_entropy(net(pixels[rows]), labels[rows]).backward()
            optimizer.step()


def main() -> None:
    torch.manual_seed(0)
    pixels, labels, wrong = images()
    net = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 10),
    )
    train(net, pixels, labels)
    parts = fa.functionalize(net, modules=["*.weight"])  # kernels (out, in, 3, 3) and a matrix

    def loss(params: dict[str, Tensor], example: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(parts.call(params, example["pixels"][None])[0], example["label"])

    batches = [{"pixels": p, "label": y} for p, y in zip(pixels.split(100), labels.split(100), strict=True)]
    attribute = fa.compose(fa.per_example_grad, fa.adafactor_norm, fa.self_influence)
    state = attribute.fit(loss, parts.params, batches)
    influence = torch.cat([attribute(loss, parts.params, batch, state)["scores"][:, 0] for batch in batches])

    first = influence.topk(FLIPPED).indices
    print(f"{ROWS} images, {FLIPPED} of them mislabelled; median self-influence of each kind:")
    print(f"  right {influence[~wrong].median():.3g}   wrong {influence[wrong].median():.3g}")
    found = wrong[first].float().mean()
    print(f"mislabelled images among the {FLIPPED} first: {found:.2f} (chance: {FLIPPED / ROWS:.2f})")


if __name__ == "__main__":
    main()

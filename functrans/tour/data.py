"""The data and the network of the tour."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Digits(NamedTuple):
    """Images of shape (examples, 1, 8, 8) with pixels in [0, 2], and the digits that they show."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


class DigitNet(nn.Module):
    """A small convolutional network.

    Its activations are smooth (tanh), for two reasons: the Hessian of a network of ReLUs with respect to its input is
    zero almost everywhere, and bounded activations train better under clipping and noise.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 16, 3, padding=1)
        self.head = nn.Linear(16 * 4 * 4, 10)

    def forward(self, images: Tensor) -> Tensor:
        hidden = F.avg_pool2d(torch.tanh(self.conv1(images)), 2)
        hidden = torch.tanh(self.conv2(hidden))
        return self.head(hidden.flatten(1))


def load_digits(seed: int) -> Digits:
    """scikit-learn's handwritten digits, a fifth of them set aside for the test."""
    from sklearn.datasets import load_digits as bundled
    from sklearn.model_selection import train_test_split

    data = bundled()
    images = torch.from_numpy(data.images).double().unsqueeze(1) / 8  # the pixels are whole numbers up to 16
    labels = torch.from_numpy(data.target).long()
    train, test = train_test_split(range(len(labels)), test_size=360, random_state=seed, stratify=data.target)
    return Digits(images[train], labels[train], images[test], labels[test])

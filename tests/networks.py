"""Small networks that tests share."""

import torch
from torch import nn


def mlp():
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4))


def cnn():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=2),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 4),
    )


class SharedLayer(nn.Module):
    """One layer under two names, used twice."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.again = self.first
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(torch.relu(self.again(torch.relu(self.first(x)))))


class TiedWeights(nn.Module):
    """Two layers that share one Parameter."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(8, 8)
        self.b = nn.Linear(8, 8)
        self.b.weight = self.a.weight
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(torch.relu(self.b(torch.relu(self.a(x)))))


def one_dimensional():
    return nn.Sequential(
        nn.Conv1d(3, 8, 3, padding=1, padding_mode="circular"), nn.ReLU(), nn.Flatten(), nn.Linear(64, 4)
    )


def three_dimensional():
    return nn.Sequential(nn.Conv3d(1, 4, 2), nn.ReLU(), nn.Conv3d(4, 4, 2), nn.Flatten(), nn.Linear(32, 4))


def single_layer():
    return nn.Linear(8, 4)


# name -> (builder, shape of one sample)
NETWORKS = {
    "mlp": (mlp, (8,)),
    "cnn": (cnn, (3, 8, 8)),
    "shared layer": (SharedLayer, (8,)),
    "tied weights": (TiedWeights, (8,)),
    "conv1d": (one_dimensional, (3, 8)),
    "conv3d": (three_dimensional, (1, 4, 4, 4)),
    "single layer": (single_layer, (8,)),
}


def build(name, batch=16):
    """The network, inputs and labels."""
    torch.manual_seed(0)
    builder, shape = NETWORKS[name]
    return builder(), torch.randn(batch, *shape), torch.randint(4, (batch,))

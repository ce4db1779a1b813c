"""Networks that tests share: small ones, and torchvision's."""

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


class UNet(nn.Module):
    """Down, up by a grouped transposed convolution to a given size, and a skip connection."""

    def __init__(self):
        super().__init__()
        self.down = nn.Conv2d(2, 8, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(8, 6, 3, stride=2, padding=1, groups=2)
        self.last = nn.ConvTranspose2d(8, 4, 1)

    def forward(self, x):
        up = self.up(torch.relu(self.down(x)), output_size=x.shape[-2:])
        return self.last(torch.relu(torch.cat([up, x], dim=1))).mean((2, 3))


def transposed_1d():
    return nn.Sequential(nn.ConvTranspose1d(3, 6, 3, groups=3), nn.ReLU(), nn.Flatten(), nn.Linear(60, 4))


def transposed_3d():
    return nn.Sequential(nn.ConvTranspose3d(1, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(54, 4))


class WordClassifier(nn.Module):
    """Embeddings of real-valued tokens (their integer part), averaged, with a bag beside them."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(10, 8, padding_idx=0)
        self.bag = nn.EmbeddingBag(10, 8, mode="sum")
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        tokens = (3 * x.abs()).long().clamp(max=9)
        weights = torch.ones_like(tokens, dtype=self.head.weight.dtype)
        return self.head(torch.cat([self.words(tokens).mean(1), self.bag(tokens, per_sample_weights=weights)], dim=1))


class BasicBlock(nn.Module):
    """ResNet's block, with a projection where the shape changes."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x):
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(y + self.shortcut(x))


def resnet():
    blocks = [BasicBlock(8, 8, 1), BasicBlock(8, 16, 2), BasicBlock(16, 16, 1)]
    stem = [nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))


class InvertedResidual(nn.Module):
    """MobileNetV2's block: expand, depthwise, project, with ReLU6 between them."""

    def __init__(self, channels, expansion):
        super().__init__()
        hidden = channels * expansion
        self.body = nn.Sequential(
            nn.Conv2d(channels, hidden, 1, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(),
            nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(),
            nn.Conv2d(hidden, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x):
        return x + self.body(x)


def mobilenet():
    stem = [nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8), nn.Hardswish()]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.0), nn.Linear(8, 4)]
    return nn.Sequential(*stem, InvertedResidual(8, 3), InvertedResidual(8, 2), *head)


class SmallTransformer(nn.Module):
    """Patches, two encoder layers of torch's own, the mean, a head."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, stride=4)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        return self.head(self.encoder(self.patches(x).flatten(2).transpose(1, 2)).mean(1))


def single_layer():
    return nn.Linear(8, 4)


def resnet18():
    from torchvision import models

    return models.resnet18(num_classes=4)


def mobilenet_v3_small():
    from torchvision import models

    return models.mobilenet_v3_small(num_classes=4, dropout=0.0)


def vit_b_16():
    from torchvision import models

    model = models.vit_b_16(image_size=32, num_classes=4)
    nn.init.normal_(model.heads.head.weight, std=0.05)  # it is zero, and would let no gradient through
    return model


# name -> (builder, shape of one sample)
NETWORKS = {
    "mlp": (mlp, (8,)),
    "cnn": (cnn, (3, 8, 8)),
    "shared layer": (SharedLayer, (8,)),
    "tied weights": (TiedWeights, (8,)),
    "conv1d": (one_dimensional, (3, 8)),
    "conv3d": (three_dimensional, (1, 4, 4, 4)),
    "u-net": (UNet, (2, 8, 8)),
    "transposed conv1d": (transposed_1d, (3, 8)),
    "transposed conv3d": (transposed_3d, (1, 2, 2, 2)),
    "embeddings": (WordClassifier, (8,)),
    "resnet": (resnet, (3, 8, 8)),
    "mobilenet": (mobilenet, (3, 8, 8)),
    "transformer": (SmallTransformer, (3, 8, 8)),
    "single layer": (single_layer, (8,)),
}

# Networks of full size with random weights, for slow tests. Their builders import torchvision, which works only in a
# test with the fixture of that name. Images of 64 pixels end as 2 x 2 at the last BatchNorm.
TORCHVISION = {
    "resnet18": (resnet18, (3, 64, 64)),
    "mobilenet_v3_small": (mobilenet_v3_small, (3, 64, 64)),
    "vit_b_16": (vit_b_16, (3, 32, 32)),
}


def build(name, batch=None):
    """A network, inputs and labels: by default 16, or 2 for a network of full size."""
    torch.manual_seed(0)
    builder, shape = {**NETWORKS, **TORCHVISION}[name]
    batch = batch or (2 if name in TORCHVISION else 16)
    model, x, y = builder(), torch.randn(batch, *shape), torch.randint(4, (batch,))
    if name in TORCHVISION:
        # With initial running statistics, the values of so many layers would vanish in evaluation.
        torch.optim.swa_utils.update_bn([x], model)
    return model, x, y

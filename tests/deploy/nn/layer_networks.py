"""Networks of transposed convolutions and of attention."""

import torch
import torch.nn.functional as F
from torch import nn

E, HEADS, N, L, S = 12, 3, 4, 5, 7
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


class UNet(nn.Module):
    """Down and up again, with a concatenation; sizes that do not halve need ``output_size``."""

    def __init__(self, groups=1, inputs=3, outputs=2):
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(inputs, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
        self.deep = nn.Sequential(nn.Conv2d(6, 12, 3, 2, 1, bias=False), nn.BatchNorm2d(12), nn.ReLU())
        self.up = nn.ConvTranspose2d(12, 6, 3, 2, 1, groups=groups)
        self.norm = nn.BatchNorm2d(6)
        self.mix = nn.Sequential(nn.Conv2d(12, 7, 3, padding=1), nn.ReLU())
        self.head = nn.ConvTranspose2d(7, outputs, 2, 2)

    def forward(self, x):
        skip = self.down(x)
        up = F.relu(self.norm(self.up(self.deep(skip), output_size=skip.shape)))
        return self.head(self.mix(torch.cat([skip, up], dim=1)))


def chain(spatial, groups):
    """Two transposed convolutions of odd numbers of channels, the first one between integer layers."""
    convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[spatial - 1]
    first = TRANSPOSED[spatial](3 * groups, 5 * groups, 3, 2, 1, 1, groups)
    modules = [convolution(1, 3 * groups, 1), nn.ReLU(), first, NORMS[spatial](5 * groups), nn.ReLU()]
    return nn.Sequential(*modules, TRANSPOSED[spatial](5 * groups, 7, 2, bias=False), nn.ReLU(), convolution(7, 3, 1))


class Attention(nn.Module):
    """Query, key and value made of one tensor of (samples, L, E), so that a calibration batch is one tensor."""

    def __init__(self, kind="cross", **options):
        super().__init__()
        self.kind = kind
        self.attention = nn.MultiheadAttention(E, HEADS, **options)
        for parameter in self.attention.parameters():
            if parameter.dim() == 1:
                nn.init.normal_(parameter)

    def inputs(self, x):
        q = k = v = x
        if self.kind == "cross":
            source = torch.cat([x.flip(1), x[:, : S - L] + 1], dim=1)
            k, v = source[..., : self.attention.kdim], source[..., -self.attention.vdim :] * 2
        return q, k, v

    def forward(self, x, **options):
        inputs = self.inputs(x)
        if not self.attention.batch_first:
            inputs = tuple(v.transpose(0, 1) for v in inputs)
        y, weights = self.attention(*inputs, **options)
        return y if self.attention.batch_first else y.transpose(0, 1), weights


class Decoder(nn.Module):
    """Cross-attention to a part of the sequence, with a mask made in forward."""

    def __init__(self, batch_first=True):
        super().__init__()
        self.batch_first = batch_first
        self.layer = nn.TransformerDecoderLayer(E, HEADS, 14, dropout=0.1, batch_first=batch_first)

    def forward(self, x):
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        x, memory = (x, x[:, :3]) if self.batch_first else (x.transpose(0, 1), x[:, :3].transpose(0, 1))
        y = self.layer(x, memory, tgt_mask=mask, tgt_is_causal=True)
        return y if self.batch_first else y.transpose(0, 1)


class Weights(nn.Module):
    """Returns the attention weights too, over learned queries."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Parameter(torch.randn(1, 2, E))
        self.attention = nn.MultiheadAttention(E, HEADS, batch_first=True, add_bias_kv=True, add_zero_attn=True)

    def forward(self, x):
        return self.attention(self.tokens.expand(x.shape[0], -1, -1), x, x)


class ViT(nn.Module):
    """Patches, a class token, encoder layers and a head, as in a vision transformer."""

    def __init__(self, layers=1):
        super().__init__()
        self.patches = nn.Conv2d(3, E, 4, 4)
        self.token = nn.Parameter(torch.zeros(1, 1, E))
        self.place = nn.Parameter(torch.randn(1, 5, E))
        layer = nn.TransformerEncoderLayer(E, HEADS, 24, activation="gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, norm=nn.LayerNorm(E), enable_nested_tensor=False)
        self.head = nn.Linear(E, 7)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1) + self.place
        return self.head(self.encoder(x)[:, 0])


def encoder(**options):
    layer = nn.TransformerEncoderLayer(E, HEADS, 14, dropout=0.1, **options)
    return nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

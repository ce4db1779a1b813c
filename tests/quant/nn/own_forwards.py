"""Layers whose own forward wraps ``super().forward``, and layers whose forward computes in another way."""

from functools import wraps

import torch
import torch.nn.functional as F
from torch import nn

from gaqat_optim import QuantizedModule, register_quantized
from gaqat_optim.deploy.nn.linear import DeployLinear
from quant.nn.library_layers import StdConv2d
from torchvision_import import import_torchvision


class Causal(nn.Conv1d):
    """As transformers' many causal convolutions, with attributes that a deployed layer has under the same names."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.left = self.dilation[0] * (self.kernel_size[0] - 1)
        self.codes = self.shift = self.weight_scale = self.left

    def forward(self, x):
        return super().forward(F.pad(x, (self.shift, 0)))


class Dropped(nn.Linear):
    """Casts, drops out and scales, with a child, a buffer, a parameter and a keyword."""

    def __init__(self, *args):
        super().__init__(*args)
        self.drop, self.offset = nn.Dropout(0.2), nn.Parameter(torch.rand(self.out_features))
        self.register_buffer("gain", torch.tensor(1.5))

    def forward(self, x, *, factor=1.0):
        x = x.to(self.weight.dtype).reshape(-1, self.weight.shape[1])
        return self.drop(super().forward(x)) * self.gain * factor + self.offset - self.bias


class Middle(nn.Linear):
    def forward(self, x):
        return super(Middle, self).forward(x.tanh())  # noqa: UP008


class Twice:
    """A mixin."""

    def forward(self, *args):
        return 2 * super().forward(*args)


class Levels(Twice, Middle):
    """Two levels with a forward, the mixin's and the middle class's, and none of its own."""


class Named(Middle):
    def forward(self, x):
        return Middle.forward(self, x) + 1


def doubles(forward):
    @wraps(forward)
    def run(self, x):
        return 2 * forward(self, x)

    return run


class Helped(nn.Conv2d):
    """A decorated forward, and a call in a method."""

    @doubles
    def forward(self, x):
        return self._run(x)

    def _run(self, x):
        return super().forward(x)


class LowRank(nn.Linear):
    """Has layers as children."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs, bias=False)
        self.down, self.up = nn.Linear(inputs, 2), nn.Linear(2, outputs)

    def forward(self, x):
        return super().forward(x) + self.up(self.down(x))


class Upsampled(nn.ConvTranspose2d):
    def forward(self, x):
        return super().forward(x, output_size=[2 * n for n in x.shape[-2:]])


class Bagged(nn.EmbeddingBag):
    def forward(self, x):
        return super().forward(x, per_sample_weights=torch.full(x.shape, 0.5)) * 3


class Tuple(nn.Linear):
    def forward(self, x):
        weight = x.mean()  # a variable
        return super().forward(x) * weight, x


class Registered(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight) + 1


class DeployRegistered(DeployLinear):
    def restore_shape(self, y, x):
        return super().restore_shape(y, x) + 1


@register_quantized(Registered)
class QuantRegistered(QuantizedModule, Registered):
    deployed_as = DeployRegistered

    def compute(self, x, weight):
        return F.linear(x, weight) + 1


class AroundStandardized(StdConv2d):
    def forward(self, x):
        return super().forward(x) + 1


class AroundRegistered(Registered):
    def forward(self, x):
        return 2 * super().forward(x)


def embedding(name):
    import_torchvision()  # transformers imports it
    from transformers.models.bart import modeling_bart
    from transformers.models.gemma3 import modeling_gemma3

    return getattr(modeling_bart, name, None) or getattr(modeling_gemma3, name)


class Block(nn.Module):
    """A layer, made into few values by a linear one."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.head = layer, nn.Linear(6, 3)

    def forward(self, x):
        y = self.layer(x)
        y = (y[0] if isinstance(y, tuple) else y).relu()
        return self.head(y if y.dim() == 2 or y.shape[-1] == 6 else y.flatten(2).mean(2))


TOKENS = torch.randint(9, (8, 5), generator=torch.Generator().manual_seed(0))
POSITIONS = torch.zeros(8, 4, dtype=torch.long)  # BART's positions ask for the shape alone
# By name: a layer with 6 outputs, and its input or the shape of it.
WRAPPING = {
    "causal": (lambda: Causal(4, 6, 3, dilation=2), (8, 4, 9)),
    "dropout": (lambda: Dropped(4, 6), (8, 4)),
    "levels": (lambda: Levels(4, 6), (8, 5, 4)),
    "by name": (lambda: Named(4, 6), (8, 4)),
    "helped": (lambda: Helped(4, 6, 3), (8, 4, 5, 5)),
    "children": (lambda: LowRank(4, 6), (8, 4)),
    "transposed": (lambda: Upsampled(4, 6, 3, stride=2, padding=1), (8, 4, 3, 3)),
    "bag": (lambda: Bagged(9, 6, mode="sum", padding_idx=1), TOKENS),
    "tuple": (lambda: Tuple(4, 6), (8, 4)),
    "around a layer known by name": (lambda: AroundStandardized(4, 6, 3), (8, 4, 5, 5)),
    "around a registered layer": (lambda: AroundRegistered(4, 6, bias=False), (8, 4)),
    "words of BART": (lambda: embedding("BartScaledWordEmbedding")(9, 6, 1, embed_scale=2.5), TOKENS),
    "positions of BART": (lambda: embedding("BartLearnedPositionalEmbedding")(9, 6), POSITIONS),
    "words of Gemma": (lambda: embedding("Gemma3TextScaledWordEmbedding")(9, 6, 1, embed_scale=2.5), TOKENS),
}


# -- layers that compute in another way ----------------------------------------------------------------------------

Parent, product = nn.Linear, F.linear


def of_weight(layer, x):
    return x * layer.weight.mean()


def other_ways():
    """Classes that reach the weight past ``super().forward``, or multiply, or do not call it."""

    class Reads(nn.Linear):
        def forward(self, x):
            return super().forward(x) * self.weight.norm()

    class ReadsInProperty(nn.Linear):
        @property
        def norm(self):
            return self.weight.norm()

        def forward(self, x):
            return super().forward(x) * self.norm

    class ReadsInFunction(nn.Linear):
        def forward(self, x):
            return of_weight(self, super().forward(x))

    class ReadsInLambda(nn.Linear):
        def forward(self, x):
            return super().forward(x) * (lambda: self.weight.norm())()

    class ReadsByString(nn.Linear):
        def forward(self, x):
            return super().forward(x) * getattr(self, "weight").norm()  # noqa: B009

    class ReadsAll(nn.Linear):
        def forward(self, x):
            return super().forward(x) + sum(p.sum() for p in self.parameters())

    class Chooses(nn.Linear):
        def forward(self, x):
            return super().forward(x) if self.training else F.linear(x, self.merged)

    class ByName(nn.Linear):
        def forward(self, x):
            return super().forward(x) + nn.Linear.forward(self, x)

    class ByAnotherName(nn.Linear):
        def forward(self, x):
            return super().forward(x) + Parent.forward(self, x)

    class PastItsBase(Middle):
        def forward(self, x):
            return super(nn.Linear, self).forward(x)

    class InClosure(nn.Linear):
        def forward(self, x):
            return super().forward(x) + base.forward(self, x)

    base = nn.Linear

    class Multiplies(nn.Linear):
        def forward(self, x):
            return super().forward(x) + x @ self.extra

    class MultipliesByFunction(nn.Linear):
        def forward(self, x):
            return super().forward(x) + torch.einsum("bi,io->bo", x, self.extra)

    class MultipliesByImported(nn.Linear):
        def forward(self, x):
            return super().forward(x) + product(x, self.extra)

    class LooksUp(nn.Embedding):
        def forward(self, x):
            return super().forward(x) + F.embedding(x, self.extra)

    class Replaces(nn.Linear):
        def forward(self, x):
            return x + 1

    class ReplacesAbove(Middle):
        def forward(self, x):
            return x + 1

    class ReplacesByAnother(Middle):
        def forward(self, x):
            return self.other.forward(x)

    class Convolves(nn.Conv2d):
        def forward(self, x):
            return super().forward(x)

        def _conv_forward(self, x, weight, bias):
            return super()._conv_forward(x, weight.abs(), bias)

    class Property(nn.Linear):
        @property
        def weight(self):
            return self.raw

        def forward(self, x):
            return super().forward(x)

    class PropertyOfBias(nn.Linear):
        @property
        def bias(self):
            return self.raw

        def forward(self, x):
            return super().forward(x)

    class HidesOurs(nn.Linear):
        def compute(self, x):
            return x + 1

        def forward(self, x):
            return self.compute(super().forward(x))

    class Attention(nn.MultiheadAttention):
        def forward(self, x):
            return super().forward(x, x, x)[0]

    return [kind for kind in locals().values() if isinstance(kind, type) and kind is not base]

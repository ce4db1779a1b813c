"""``convert``: from the trained network to the integers that run."""

from __future__ import annotations

import copy
import re
import warnings
from collections import Counter

import torch
from torch import nn

from ..quant.float_weights import warn_of_new_float_layers
from ..quant.graph.forward_around import ForwardAround
from ..quant.graph.norm import Norm
from ..quant.graph.output_hook import modules_with_output_quantizer
from ..quant.lsq.quantizer import LSQQuantizer
from ..quant.nn.base import QuantizedModule
from .batchnorm_folding import following_norms
from .bias_rounding import remove_rounding
from .forward_without_norm import without_norms
from .module_tree import replace_modules
from .nn.activation_quantizer import ActivationQuantizer, QuantDequant
from .nn.base import DeployLayer
from .nn.linear import route_deployed_layers
from .nn.registry import DeployedModule, deployed_class
from .weight_sharing import share_weights


def convert(model: nn.Module) -> nn.Module:
    r"""Copy a quantized network into the form that is deployed: integer weights, integer biases, BatchNorm folded in.

    Every quantized layer becomes one that computes, with the codes a of its input and q of its weight,

    .. math::

        a = \mathrm{clamp}(\mathrm{round}(x / s_a), Q_n, Q_p), \qquad
        y_c = u_c \left( \sum a\,2^k q_c + b_c \right), \qquad
        u_c = s_a s'_c / 2^k

    with an exact sum and one multiplication, in float32. A BatchNorm behind the layer goes into the scale and the
    bias; the weight keeps its trained codes:

    .. math::

        s'_c = s_c \gamma_c / \sigma_c, \qquad
        b_c = \mathrm{round}\left( \frac{\beta_c + (b_c^{\mathrm{float}} - \mu_c) \gamma_c / \sigma_c}{u_c} \right)
        \in \mathrm{int32}

    A negative gamma gives a negative scale. The rounding of the bias is the only difference from the trained network,
    beyond the last bits of floating-point sums. With k = 0 it is coarse at few bits: in a trained 3-bit network it
    changed 13 % of the predictions. So weight codes of b < 8 bits are shifted up by k <= 8 - b binary digits, which
    makes the accumulator scale u_c finer.

    A layer whose class has a forward of its own around ``super().forward`` becomes that forward, around its child
    ``wrapped_layer``: the deployed layer. A BatchNorm behind it is folded if it returns what ``super().forward`` does.

    A channel with gamma = 0 keeps its bias alone. So does a channel whose gamma is so small that the bias does not fit
    into int32, with a warning. If the weight or the input of a layer is in floating point, so is its bias.

    A BatchNorm is found by symbolic tracing or, where that fails, by ``torch.export`` on inputs like those of the
    calibration. It counts by what it computes: a module with torch's forward (``nn.SyncBatchNorm`` has), a call of
    ``F.batch_norm`` with tensors of the module that calls it, or a module that begins with the same in arithmetic
    (torchvision's ``FrozenBatchNorm2d``). What follows in the same forward, such as an activation, is kept. It is
    folded if it is the only user of the layer's output, is used once, and has running statistics. Between them may be
    what only moves values and keeps the channels on one axis: ``flatten``, ``permute``, ``torch.cat`` of several
    layers; and no hook, which may change the values. Otherwise it stays as it is, with a warning that names it and says
    why. A BatchNorm behind a sum or an activation (pre-activation networks, identity branches) follows no layer, and
    stays too: none could contain it.

    Args:
        model: a network from :func:`~gaqat_optim.quantize_model` whose scales are all set. It stays as it is.

    Returns:
        A network of the same class, in evaluation mode and without gradients: the numeric specification of an export.
        It keeps ``quant_config``.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: nothing is quantized; the model is converted already; a layer has no deployed form; a quantizer is
            switched off or has no scale yet; or a scale, a weight or a value of a BatchNorm is not finite.

    Warns:
        UserWarning: BatchNorms that follow layers could not be folded, or the network could not be traced for them; or
            layers in floating point came after ``quantize_model``, as by ``reparameterize`` or ``fuse``.

    Example:
        >>> from gaqat_optim import QuantConfig, quantize_model
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> net = quantize_model(net, QuantConfig(first_last_bits="same"), calibration=torch.rand(16, 3, 8, 8))
        >>> print(convert(net))
        Sequential(
          (0): DeployConv(
            4-bit weight (8, 3, 3, 3) per channel, int32 bias, BatchNorm folded, sums in float32, stride=(1, 1), ...
            (input_quantizer): ActivationQuantizer(4 bits, unsigned, scale 0.0...)
          )
          (1): Identity()
          (2): ReLU()
        )
    """
    _check(model)
    model = copy.deepcopy(model).eval().requires_grad_(False)
    remove_rounding(model)  # What the hooks add is in the deployed biases.
    for name, module in model.named_modules():
        if isinstance(module, LSQQuantizer):
            module.name = name  # The model may have become part of another one.
    norms, left = following_norms(model)
    if left:
        _warn_of_norms(model, left)
    folded: dict[nn.Module, list[Norm]] = {}
    for norm in norms.values():
        folded.setdefault(norm.module, []).append(norm)
    by_quantizer: dict[LSQQuantizer, list[DeployLayer]] = {}  # the layers whose weight it quantizes
    output_quantizers = {module.output_quantizer for module in modules_with_output_quantizer(model)}

    def deployed(name: str, module: nn.Module) -> nn.Module:
        if isinstance(module, QuantizedModule):
            layer = _deployed_class(name, module).from_quantized(name, module, norms.get(module))
            if isinstance(layer, DeployLayer) and module.weight_quantizer is not None:
                by_quantizer.setdefault(module.weight_quantizer, []).append(layer)
            return layer if module.inner_class is None else ForwardAround.of(module, layer)
        if module in folded:
            return without_norms(module, folded[module])
        if isinstance(module, LSQQuantizer) and module in output_quantizers:
            return QuantDequant(ActivationQuantizer.from_quantizer(module))
        return module

    with torch.no_grad():
        result = replace_modules(model, deployed).eval()
        for layers in by_quantizer.values():
            share_weights(layers)
    route_deployed_layers(result)
    if hasattr(model, "quant_config"):
        result.quant_config = model.quant_config  # A model that is itself a layer has become another object.
    return result


def _warn_of_norms(model: nn.Module, left: dict[nn.Module, str]) -> None:
    """Warn of the BatchNorms behind layers that stay, with a reason for each; those of repeated blocks share a line."""
    names = {module: name for name, module in model.named_modules()}
    count: Counter[tuple[str, str]] = Counter()
    for module, reason in left.items():
        count[_pattern(names[module] or "the model"), _pattern(reason)] += 1
    lines = [f"\n  {name}{f' ({n} of them)' if n > 1 else ''}: {reason}" for (name, reason), n in count.items()]
    warnings.warn(
        f"{len(left)} BatchNorms that follow quantized layers stay in floating point:{''.join(lines)}\n"
        "That is correct, but slower, and in a file the layers before them have no integer kernels without output_bits",
        stacklevel=3,
    )


def _pattern(text: str) -> str:
    """A text with ``*`` for the numbers in names, ``blocks.*.norm``."""
    return re.sub(r"(?<=\.)\d+(?=\.)|(?<=[a-z])\d+(?=\.)", "*", text)


def _check(model: nn.Module) -> None:
    """Raise for a model that cannot be converted."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"convert takes a model from quantize_model, got {type(model).__name__}")
    if any(isinstance(module, DeployedModule) for module in model.modules()):
        raise ValueError("the model is converted already: it has deployed layers")
    if not any(isinstance(module, QuantizedModule) for module in model.modules()):
        raise ValueError(f"{type(model).__name__} has no quantized layers: call quantize_model first, and train")
    for name, module in model.named_modules():
        if isinstance(module, LSQQuantizer):
            _check_quantizer(name, module)
        elif isinstance(module, QuantizedModule):
            _deployed_class(name, module)
            for slot, parameter in module.named_parameters(recurse=False):
                if not bool(torch.isfinite(parameter).all()):
                    raise ValueError(f"{name or 'the model'!r} has a {slot} that is not finite")
    warn_of_new_float_layers(model)


def _deployed_class(name: str, layer: QuantizedModule) -> type[DeployedModule]:
    deployed = deployed_class(type(layer))
    if deployed is None:
        raise ValueError(
            f"{name or 'the model'!r}: there is no deployed form of {type(layer).__name__}, whose computation is its "
            f"own. Set deployed_as in that class to a DeployLayer that computes the same, or leave the layer in "
            f"floating point: quantize_model with exclude=({name!r},)"
        )
    return deployed


def _check_quantizer(name: str, quantizer: LSQQuantizer) -> None:
    if not quantizer.enabled:
        raise ValueError(f"the quantizer {name!r} is switched off: convert outside of quantization_disabled")
    if not quantizer.is_initialized:
        raise ValueError(
            f"the quantizer {name!r} has no scale yet: pass calibration= to quantize_model, or train for a step"
        )
    scale = quantizer.scale.detach().to(torch.float32)
    if not bool((torch.isfinite(scale) & (scale > 0)).all()):
        raise ValueError(f"the quantizer {name!r} has a scale that is not finite and positive: {scale.tolist()}")

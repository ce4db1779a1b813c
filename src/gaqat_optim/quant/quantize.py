"""``quantize_model``: every supported layer of a network, replaced by its quantized version."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..scale_names import is_scale_name
from .calibration import calibrate, check_batches, record_inputs
from .config import LayerConfig, QuantConfig
from .evaluation import device_of, isolate_rng
from .first_forward import FirstForwardCheck, activation_quantizers
from .float_weights import FloatWeights, product_weights, remember_float_layers
from .graph.export_trace import forget_inputs
from .graph.first_last import first_and_last
from .graph.output_quantizers import place_output_quantizers
from .inputs import run_batch
from .lsq.quantizer import LSQQuantizer
from .lsq.rank_agreement import is_distributed
from .nn.attention import disable_fast_paths
from .nn.base import QuantizedModule
from .nn.functional_calls import route_functional_calls
from .nn.registry import QUANTIZED, quantized_class
from .nn.unsupported import refuse, unsupported_reason
from .tied_weights import share_weight_quantizers


def quantize_model(
    model: nn.Module,
    config: QuantConfig = QuantConfig(),  # noqa: B008 (immutable)
    *,
    calibration: Tensor | Iterable[Any] | None = None,
    forward: Callable[[nn.Module, Any], object] | None = None,
    inplace: bool = False,
) -> nn.Module:
    """Replace the layers of ``model`` by versions that train through LSQ quantizers.

    The layers are ``nn.Linear``, ``nn.Conv1d`` to ``Conv3d``, ``nn.ConvTranspose1d`` to ``ConvTranspose3d``, the
    projections of ``nn.MultiheadAttention`` (and so torch's transformer layers, whose fast paths past the quantizers
    are turned off) and, with quantized weights alone, ``nn.Embedding`` and ``nn.EmbeddingBag``. They are matched by
    what they compute: a subclass that inherits its forward is swapped like its base. So is one whose own forward calls
    ``super().forward`` and reaches the weight in no other way: what it computes before and behind stays. Any other
    forward stays in floating point, unless its class is registered (``gaqat_optim.register_quantized``), or known by
    name: timm's ``Linear``, its convolutions with "same" padding and with standardized weights, and transformers'
    ``Conv1D`` and ``FalconLinear``.
    Every other module, every hook and every key of the state dict stays; only the keys of the quantizers are new. A
    forward that calls ``F.linear`` with the weight of a quantized linear layer, as window attention does, calls the
    layer.

    Build the optimizer after this call, or it will not train the scales, and call
    ``SyncBatchNorm.convert_sync_batchnorm`` before it, since that makes new modules.

    Args:
        model: the network, usually trained in floating point. It is copied unless ``inplace``.
        config: what to quantize and to how many bits.
        calibration: inputs that set the activation scales: a tensor, or an iterable of batches. A few batches of
            training data do. Without it, the first forward pass in training mode sets the activation scales, that of an
            expert its first token. The ranks of ``torch.distributed`` (the default group) agree on them at the end of
            the model's forward, which each rank must call equally often; with fully_shard, calibrate.
        forward: ``forward(model, batch)`` runs one batch of ``calibration``, whose tensors, nested ones too, are on
            the model's device then. By default a tensor is the input, of a tuple or list the first item is, and a
            mapping goes in as keywords, those that the model's forward takes.
        inplace: change ``model`` itself, with the same Parameter objects, instead of a copy. A model that is itself a
            layer cannot be changed in place: use the returned module.

    Returns:
        The quantized network. Its ``quant_config`` is ``config``, to build it again for a checkpoint. If it took a
        calibration to find the first and last layers, their bits are ``overrides`` in it.

    Raises:
        TypeError: ``model``, ``config``, ``forward`` or a calibration batch is of the wrong type.
        ValueError: nothing to quantize, already quantized, modules that cannot be (such as an LSTM), weights that a
            forward reads past their layer, a pattern that matches no layer, an empty calibration, ``forward`` without
            calibration, or weights or activations that are not finite. ``model`` is then unchanged.

    Warns:
        UserWarning: more than a tenth of the weights of linear and convolutional layers stays in floating point, and
            ``config`` does not say so: layers that compute in another way, or parameters that a forward multiplies.
            With ``calibration``, also more than a tenth of the multiply-accumulates in its first batch.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from gaqat_optim import quantization_summary
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))
        >>> net = quantize_model(net, QuantConfig(4, 4), calibration=torch.rand(16, 3, 8, 8))
        >>> print(quantization_summary(net))
        layer  type         weights             signal/noise  activations      output    bytes
        0      QuantConv2d  8 bits per channel  ... dB       8 bits unsigned  floating  284
        3      QuantLinear  8 bits per channel  ... dB       8 bits unsigned  floating  2,964
        in all: 3,248 bytes
        quantized: 100.0 % of the weights
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"quantize_model takes an nn.Module, got {type(model).__name__}")
    if not isinstance(config, QuantConfig):
        raise TypeError(f"config must be a QuantConfig, got {type(config).__name__}")
    if forward is not None and not callable(forward):
        raise TypeError(f"forward must be a function of model and batch, got {type(forward).__name__}")
    if forward is not None and calibration is None:
        raise ValueError("forward runs the batches of calibration, and there are none: pass calibration= as well")
    _layer_configs(model, config)  # refuses all that it can before the copy
    # The network can be trained, even if it is quantized where results are only looked at.
    with torch.inference_mode(False), ExitStack() as restore, ExitStack() as undo:
        # undo runs, in reverse, if anything below fails
        if not inplace:
            model = copy.deepcopy(model)
        if calibration is not None:
            check_batches(calibration)
            restore.enter_context(isolate_rng(device_of(model), calibration))
            undo.callback(forget_inputs, model)
            calibration = record_inputs(model, calibration, forward or run_batch)
        ends = None
        if config.first_last_bits != "same":
            layers = _layers(model)
            ends, by_calibration = first_and_last(model, layers)
            ends = _with_tied(ends, layers)
            config = config.with_ends(ends) if by_calibration else config
        layer_configs, asked = _layer_configs(model, config, ends)
        replacements: dict[nn.Module, QuantizedModule] = {}
        for name, module, layer in layer_configs:
            if module not in replacements:
                replacements[module] = _quantized_layer(name, module, layer)
        # A layer with a forward of its own may have children that are layers.
        for parent in [*model.modules(), *replacements.values()]:
            for slot, child in list(parent._modules.items()):
                if child in replacements:
                    undo.callback(parent._modules.__setitem__, slot, child)
                    parent._modules[slot] = replacements[child]
        result = replacements.get(model, model)
        share_weight_quantizers(result, asked)
        place_output_quantizers(result, undo)
        disable_fast_paths(result, undo=undo)  # before calibration, whose evaluation mode would take them
        route_functional_calls(result, undo=undo)
        watch = FloatWeights(result, asked)
        if calibration is not None:
            calibrate(result, calibration, forward or run_batch, exclude=config.exclude, first_batch=watch.counting())
        if result is model and (is_distributed() or any(not q.is_initialized for q in activation_quantizers(result))):
            check = FirstForwardCheck(config.exclude, calibrated=calibration is not None)
            undo.callback(result.register_forward_pre_hook(check).remove)
        if config.weight_bits is not None:
            watch.warn(config.exclude)
        undo.pop_all()
    result.quant_config = config  # type: ignore[assignment]
    remember_float_layers(result)
    return result


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that can be quantized, by all their names."""
    modules = model.named_modules(remove_duplicate=False)
    return {name: m for name, m in modules if quantized_class(type(m)) and unsupported_reason(m) is None}


def _layer_configs(
    model: nn.Module, config: QuantConfig, ends: Collection[str] | None = None
) -> tuple[list[tuple[str, nn.Module, LayerConfig]], set[nn.Module]]:
    """The layers to quantize, with names and configurations, and the modules that the user leaves in floating point.

    ``ends`` are the names of the first and last layers. Raises for all that cannot be quantized.
    """
    for name, module in model.named_modules():
        if isinstance(module, LSQQuantizer):
            raise ValueError(
                f"the model is quantized already: {name!r} is a quantizer. Call quantize_model once, on the float model"
            )
    modules = dict(model.named_modules(remove_duplicate=False))
    reasons = {name: reason for name, module in modules.items() if (reason := unsupported_reason(module)) is not None}
    layers = _layers(model)
    holders = {name: module for name, module in modules.items() if product_weights(module)}
    excluded = config.excluded({**holders, **layers, **{name: modules[name] for name in reasons}})
    refusals: dict[nn.Module, tuple[str, str]] = {}
    for name, reason in reasons.items():
        if modules[name] not in excluded:
            refusals.setdefault(modules[name], (name, reason))
    refuse(model, list(refusals.values()), config.exclude)
    if not layers:
        types = sorted({type(m).__name__ for m in model.modules() if any(True for _ in m.parameters(recurse=False))})
        raise ValueError(
            f"nothing to quantize: {type(model).__name__} has no {', '.join(t.__name__ for t in QUANTIZED)} "
            f"(a subclass is left alone if its own forward does not only wrap super().forward). "
            f"Its modules with parameters: {', '.join(types) or 'none'}"
        )
    layer_configs = []
    for name, layer_config in config.resolve(layers, excluded, ends).items():
        if layer_config is not None and not _quantized_class(layers[name]).quantizes_input:
            layer_config = replace(layer_config, activation_bits=None, output_bits=None)
        if layer_config is not None and not layer_config.quantizes_nothing:
            layer_configs.append((name, layers[name], layer_config))
    if not layer_configs:
        raise ValueError(f"nothing to quantize: the configuration leaves all {len(layers)} layers in floating point")
    chosen = {layer for _, layer, _ in layer_configs}
    left = excluded | {layer for layer in layers.values() if layer not in chosen}
    within = {inner for name in (*layers, *reasons) if modules[name] in left for inner in modules[name].modules()}
    return layer_configs, left | within


def _with_tied(names: set[str], layers: Mapping[str, nn.Module]) -> set[str]:
    """The names and those of other ``layers`` with one of their weights, whose codes should be the same."""

    def weights(layer: nn.Module) -> set[int]:
        # An attention quantizes the out-projection that it holds.
        holders = [layer, *(m for m in layer.children() if isinstance(m, NonDynamicallyQuantizableLinear))]
        return {id(m._parameters["weight"]) for m in holders if m._parameters.get("weight") is not None}

    shared = {weight for name in names for weight in weights(layers[name])}
    return names | {name for name, layer in layers.items() if weights(layer) & shared}


def _quantized_class(module: nn.Module) -> type[QuantizedModule]:
    quantized = quantized_class(type(module))
    assert quantized is not None
    return quantized


def _quantized_layer(name: str, module: nn.Module, layer: LayerConfig) -> QuantizedModule:
    quantized = _quantized_class(module).from_float(module, layer)
    for attribute, quantizer in quantized.quantizers():
        quantizer.name = f"{name}.{attribute}" if name else attribute
    quantized.initialize_weight()
    return quantized


def param_groups(model: nn.Module, *, weight_decay: float = 0.0, scale_lr: float | None = None) -> list[dict[str, Any]]:
    """The trainable parameters of ``model`` as groups for a ``torch.optim`` optimizer: scales take no weight decay.

    Args:
        model: a network, quantized or not.
        weight_decay: weight decay of all parameters but the scales.
        scale_lr: learning rate of the scales; ``None`` for the optimizer's.

    Returns:
        One group for all other parameters and, if the model has scales, one for them.

    Example:
        >>> import torch
        >>> net = quantize_model(torch.nn.Linear(2, 1), calibration=torch.rand(8, 2))
        >>> base = torch.optim.AdamW(param_groups(net, weight_decay=1e-2), lr=1e-3)
        >>> [(len(g["params"]), g["weight_decay"]) for g in base.param_groups]
        [(2, 0.01), (2, 0.0)]
    """
    scales: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (scales if is_scale_name(name) else others).append(parameter)
    groups: list[dict[str, Any]] = [{"params": others, "weight_decay": weight_decay}]
    if scales:
        groups.append({"params": scales, "weight_decay": 0.0})
        if scale_lr is not None:
            groups[1]["lr"] = scale_lr
    return groups


def scale_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The scales of ``model`` by qualified name, as the parameters that are learned: log(s), or s.

    Example:
        >>> import torch
        >>> net = quantize_model(torch.nn.Linear(2, 1), calibration=torch.rand(8, 2))
        >>> list(scale_parameters(net))
        ['weight_quantizer.lsq_log_scale', 'input_quantizer.lsq_log_scale']
    """
    return {name: p for name, p in model.named_parameters() if is_scale_name(name)}

"""What a packed file says of a network: its deployed layers, what does nothing, and every tensor by name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...quant.nn.base import QuantizedModule
from ..nn.attention import ROLES, SHAPE, DeployMultiheadAttention
from ..nn.layers import ActivationQuantizer, DeployLayer, QuantDequant
from .container import Stored, read

_PARTS = ("codes", "weight_scale", "float_weight", "bias_codes", "float_bias")
_GEOMETRY = ("stride", "padding", "dilation", "groups", "padding_mode", "output_padding")


@dataclass(frozen=True)
class PackedLayer:
    """What the file says of a deployed layer beside its tensors; several names are those of one layer used as often."""

    names: list[str]
    kind: str
    weight_bits: int | None
    shift: int
    folded: bool
    input_quantizer: dict[str, Any] | None
    output_quantizer: dict[str, Any] | None
    geometry: dict[str, Any]


@dataclass(frozen=True)
class PackedOutput:
    """What the file says of an output quantizer behind a module that is no deployed layer."""

    names: list[str]
    quantizer: dict[str, Any]


@dataclass(frozen=True)
class PackedAttention:
    """What the file says of an attention layer beside its projections, which are layers; its names, and its shape."""

    names: list[str]
    shape: dict[str, Any]


@dataclass(frozen=True)
class Contents:
    """A file that was read.

    Attributes:
        layers: the deployed layers.
        outputs: the output quantizers of other modules.
        identities: the modules that do nothing, folded BatchNorms among them.
        tensors: every tensor by name.
    """

    layers: list[PackedLayer]
    outputs: list[PackedOutput]
    attentions: list[PackedAttention]
    identities: list[str]
    tensors: list[Stored]

    @classmethod
    def of(cls, target: Path) -> Contents:
        settings, tensors = read(target)
        try:
            layers = [PackedLayer(**entry) for entry in settings["layers"]]
            outputs = [PackedOutput(**entry) for entry in settings["outputs"]]
            stored = {name for entry in tensors for name in entry.names}
            missing = [name for layer in layers for name in _needed(layer) if name not in stored]
            missing += [name for output in outputs if (name := scale_name(output)) not in stored]
            attentions = [PackedAttention(**entry) for entry in settings["attentions"]]
            projected = {name for layer in layers for name in layer.names}
            needed = [join(name, slot) for one in attentions for name in one.names for slot in (*ROLES, "out_proj")]
            missing += [name for name in needed if name not in projected]
            if missing:
                raise KeyError(f"no entry for {', '.join(missing)}")
            return cls(layers, outputs, attentions, [str(name) for name in settings["identities"]], tensors)
        except (KeyError, TypeError, IndexError) as error:
            raise ValueError(f"{str(target)!r} is not as save_packed writes files: {error}") from error


def _needed(layer: PackedLayer) -> list[str]:
    """The names of the tensors without which ``layer`` cannot be made."""
    parts = ["float_weight"] if layer.weight_bits is None else ["codes", "weight_scale"]
    kinds = ("input_quantizer", "output_quantizer")
    parts += [f"{kind}.scale" for kind in kinds if getattr(layer, kind) is not None]
    return [join(layer.names[0], part) for part in parts]


def scale_name(output: PackedOutput) -> str:
    """The name of the scale of an output quantizer."""
    return join(output.names[0], "output_quantizer.quantizer.scale")


def modules_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """All modules, by all their names."""
    return list(model.named_modules(remove_duplicate=False))


def join(prefix: str, name: str) -> str:
    """The qualified name of ``name`` in ``prefix``."""
    return f"{prefix}.{name}" if prefix else name


def tensors_of(model: nn.Module) -> list[tuple[list[str], Tensor]]:
    """All parameters and buffers, each once with all its names, but for the unit, which follows from the scales."""
    found: dict[int, tuple[list[str], Tensor]] = {}
    for prefix, module in modules_of(model):
        for name, v in [*module._parameters.items(), *module._buffers.items()]:
            if v is not None and not (isinstance(module, DeployLayer) and name == "unit"):
                found.setdefault(id(v), ([], v))[0].append(join(prefix, name))
    return list(found.values())


def layers_of(deployed: nn.Module) -> list[PackedLayer]:
    """The deployed layers; raises for what the file would not hold."""
    found: dict[DeployLayer, list[str]] = {}
    for name, module in modules_of(deployed):
        if isinstance(module, QuantizedModule):
            raise ValueError(
                f"{name!r} is quantized and not converted, beside layers that are: convert the whole model"
            )
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise ValueError(f"{name!r} has extra state ({type(module).__name__}.get_extra_state), which no file holds")
        if isinstance(module, DeployLayer):
            found.setdefault(module, []).append(name)
    return [_described(layer, names) for layer, names in found.items()]


def outputs_of(deployed: nn.Module) -> list[PackedOutput]:
    """The output quantizers of modules that are no deployed layers."""
    found: dict[nn.Module, list[str]] = {}
    for name, module in modules_of(deployed):
        if isinstance(module._modules.get("output_quantizer"), QuantDequant):
            found.setdefault(module, []).append(name)
    return [PackedOutput(names, _settings(m.output_quantizer.quantizer) or {}) for m, names in found.items()]  # type: ignore[union-attr,arg-type]


def attentions_of(model: nn.Module) -> list[PackedAttention]:
    """The deployed attention layers."""
    found: dict[DeployMultiheadAttention, list[str]] = {}
    for name, module in modules_of(model):
        if isinstance(module, DeployMultiheadAttention):
            found.setdefault(module, []).append(name)
    return [PackedAttention(names, attention_shape(module)) for module, names in found.items()]


def attention_shape(attention: nn.Module) -> dict[str, Any]:
    """What an attention layer computes beside its projections, as JSON has it."""
    return {name: getattr(attention, name) for name in SHAPE}


def _described(layer: DeployLayer, names: list[str]) -> PackedLayer:
    activation = layer.input_quantizer
    if layer.unit is not None and activation is not None and layer.weight_scale is not None:
        unit = activation.scale * layer.weight_scale
        if layer.unit.dtype != unit.dtype or not torch.equal(layer.unit, unit):
            raise ValueError(
                f"{names[0]!r} was changed after convert (by a cast to another dtype?): the unit of its sums is no "
                "longer the product of its scales"
            )
    return PackedLayer(
        names,
        type(layer).__name__,
        layer.weight_bits,
        layer.shift,
        layer.folded,
        _settings(activation),
        _settings(layer.output_quantizer),
        geometry(layer),
    )


def _settings(quantizer: ActivationQuantizer | None) -> dict[str, Any] | None:
    return None if quantizer is None else {name: getattr(quantizer, name) for name in ("bits", "signed", "name")}


def geometry(layer: nn.Module) -> dict[str, Any]:
    """What the layer's operation needs beside its operands, as JSON has it."""
    values = {name: getattr(layer, name) for name in _GEOMETRY if hasattr(layer, name)}
    if not any(values.get("output_padding", ())):  # Only transposed convolutions have any.
        values.pop("output_padding", None)
    return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}


def parts_of(layer: PackedLayer, stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of ``layer`` among all that are ``stored``, by the names that a deployed layer has for them."""
    names = {part: join(layer.names[0], part) for part in _PARTS}
    return {part: stored[name] for part, name in names.items() if name in stored}

"""``load_packed``: a file of ``save_packed`` as a network again."""

from __future__ import annotations

import copy
import os
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ...quant.config import LayerConfig
from ...quant.graph.output_hook import attach, detach, modules_with_output_quantizer
from ...quant.nn.attention import QuantMultiheadAttention, disable_fast_paths
from ...quant.nn.base import QUANTIZED, QuantizedModule
from ..convert import TABLES
from ..nn.attention import ROLES, DeployMultiheadAttention, out_projection, projections
from ..nn.layers import DEPLOYED, ActivationQuantizer, DeployLayer, QuantDequant
from .manifest import (
    Contents,
    PackedLayer,
    attention_shape,
    geometry,
    join,
    modules_of,
    parts_of,
    scale_name,
    tensors_of,
)
from .save import packed_path

_ALL_FLOAT = LayerConfig(None, None, "tensor", "auto", None, "mse", "log")
_WRONG_ARCHITECTURE = "The file was saved from another architecture"


def load_packed(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Read a file of :func:`~gaqat_optim.save_packed`: the network computes what the saved one does, bit for bit.

    Nothing in the file is executed: it is JSON and numbers, and is checked against its SHA-256 before any of it is
    used. That finds damage, not malice: who can write the file can write other weights, and their checksum.

    The file is mapped into memory instead of being read into it, so a large one is there once, as the network's
    tensors. These are copies and no views of the file, because bit planes have to be unpacked into int8.

    Args:
        model: a network of the same architecture, in floating point or from :func:`~gaqat_optim.quantize_model`, with
            whatever values; on the meta device, if you like. It stays as it is. What the file does not hold comes from
            it: the code, plain attributes such as a BatchNorm's eps, hooks, and on which device each tensor is (the
            CPU, for one on the meta device).
        path: the file.

    Returns:
        The network that :func:`~gaqat_optim.convert` made, or would have made, of the saved one: a new one, in
        evaluation mode and without gradients.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: the file is none of :func:`~gaqat_optim.save_packed`, is of another version of the format, or
            damaged, or was saved from another architecture; or ``model`` is converted already.
        OSError: there is no such file, or it is a folder, or cannot be read.

    Example:
        >>> import tempfile
        >>> from gaqat_optim import quantize_model, save_packed
        >>> quantized = quantize_model(nn.Sequential(nn.Linear(8, 4)), calibration=torch.rand(16, 8))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     size = save_packed(quantized, f"{folder}/net.packed")
        ...     print(load_packed(nn.Sequential(nn.Linear(8, 4)), f"{folder}/net.packed"))
        Sequential(
          (0): DeployLinear(
            8-bit weight (4, 8) per channel, int32 bias, sums in float32
            (input_quantizer): ActivationQuantizer(8 bits, unsigned, scale 0.0...)
          )
        )
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"load_packed takes the float network, or one from quantize_model; got {type(model).__name__}")
    if any(isinstance(module, DeployLayer) for module in model.modules()):
        raise ValueError("the model is converted already: load_packed takes the float network, or the quantized one")
    contents = Contents.of(packed_path(path))
    stored = {name: entry.tensor for entry in contents.tensors for name in entry.names}
    originals = _with_projections(contents, dict(modules_of(model)))
    _check_modules(contents, originals, stored)
    # A quantized layer in each place, as when the network was saved, and nowhere else.
    result = _with_deployed_attention(contents, _empty_copy(model), originals)
    named = dict(modules_of(result))
    places = {named[name] for layer in contents.layers for name in layer.names}
    swapped: dict[nn.Module, nn.Module] = {}
    for module in named.values():
        if module in places and not isinstance(module, QuantizedModule):
            swapped[module] = QUANTIZED[type(module)].from_float(module, _ALL_FLOAT)
        elif module not in places and isinstance(module, QuantizedModule):
            swapped[module] = _as_float(module)
    result = _swap(result, swapped)
    for module in list(modules_with_output_quantizer(result)):
        detach(module)
    disable_fast_paths(result)
    # Now the deployed layers, which take the geometry and the hooks of those.
    named = dict(modules_of(result))
    swapped = {named[name]: nn.Identity() for name in contents.identities if type(named[name]) is not nn.Identity}
    for layer in contents.layers:
        device = _device(originals[layer.names[0]].weight)
        deployed = _deployed(layer, named[layer.names[0]], stored, device)
        for name in layer.names:
            if swapped.setdefault(named[name], deployed) is not deployed:
                raise ValueError(f"{name!r} is another layer under another name in the network. {_WRONG_ARCHITECTURE}")
    result = _swap(result, swapped)
    for output in contents.outputs:
        site = dict(modules_of(result))[output.names[0]]
        scale = stored[scale_name(output)].to(_default_device(model))
        attach(site, QuantDequant(ActivationQuantizer(scale, **output.quantizer)))
    _separate_tables(result, contents)
    _fill(result, contents, {name: v for names, v in tensors_of(model) for name in names})
    return result.eval().requires_grad_(False)


# -- from a float or quantized network to the one in the file ----------------------------------------------------------


def _with_projections(contents: Contents, modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """The modules with the projections of attention layers as layers of their own, where the file has them so."""
    modules = dict(modules)
    for attention in contents.attentions:
        for name in attention.names:
            module = modules.get(name)
            if type(module) not in (nn.MultiheadAttention, QuantMultiheadAttention):
                found = "no module" if module is None else f"a {type(module).__name__}"
                raise ValueError(f"{name!r} is {found} in the network and attention in the file. {_WRONG_ARCHITECTURE}")
            assert module is not None
            if attention_shape(module) != attention.shape:
                shapes = f"{attention_shape(module)} in the network and {attention.shape} in the file"
                raise ValueError(f"{name!r} has {shapes}. {_WRONG_ARCHITECTURE}")
            modules |= {join(name, role): linear for role, linear in projections(module).items()}
            modules[join(name, "out_proj")] = out_projection(module)
    return modules


def _with_deployed_attention(contents: Contents, model: nn.Module, originals: dict[str, nn.Module]) -> nn.Module:
    """The network with deployed attention layers, whose projections are still to be replaced."""
    named, swapped = dict(modules_of(model)), dict[nn.Module, nn.Module]()
    for attention in contents.attentions:
        for name in attention.names:
            linears = {role: originals[join(name, role)] for role in ROLES}
            linears["out_proj"] = out_projection(named[name])
            swapped.setdefault(named[name], DeployMultiheadAttention(named[name], **linears))
    return _swap(model, swapped)


def _check_modules(contents: Contents, modules: dict[str, nn.Module], stored: dict[str, Tensor]) -> None:
    """Raise where the network has another module than the one that was saved under a name."""
    for layer in contents.layers:
        for name in layer.names:
            module: Any = modules.get(name)
            kind = type(module) if isinstance(module, QuantizedModule) else QUANTIZED.get(type(module))
            deployed = DEPLOYED.get(kind) if kind is not None else None
            if deployed is None or deployed.__name__ != layer.kind:
                found = "no module" if module is None else f"a {type(module).__name__}"
                raise ValueError(
                    f"{name!r} is {found} in the network and a {layer.kind} in the file. {_WRONG_ARCHITECTURE}"
                )
            parts = parts_of(layer, stored)
            weight = parts["codes"] if "codes" in parts else parts["float_weight"]
            if module.weight.shape != weight.shape:
                shapes = f"{tuple(module.weight.shape)} in the network and {tuple(weight.shape)} in the file"
                raise ValueError(f"{name!r} has a weight of shape {shapes}. {_WRONG_ARCHITECTURE}")
            if geometry(module) != layer.geometry:
                geometries = f"{geometry(module)} in the network and {layer.geometry} in the file"
                raise ValueError(f"{name!r} has {geometries}. {_WRONG_ARCHITECTURE}")
            if not layer.folded and (module.bias is None) == ("bias_codes" in parts or "float_bias" in parts):
                where = "the file" if module.bias is None else "the network"
                raise ValueError(f"{name!r} has a bias only in {where}. {_WRONG_ARCHITECTURE}")
    for output in contents.outputs:
        if not all(name in modules for name in output.names):
            raise ValueError(
                f"{output.names[0]!r} has an output quantizer in the file, and is no module. {_WRONG_ARCHITECTURE}"
            )
    for name in contents.identities:
        if not isinstance(modules.get(name), nn.Identity | _BatchNorm):
            found = "no module" if name not in modules else f"a {type(modules[name]).__name__}"
            raise ValueError(
                f"{name!r} is {found} in the network, and nothing or a folded BatchNorm in the file. "
                f"{_WRONG_ARCHITECTURE}"
            )


def _empty_copy(model: nn.Module) -> nn.Module:
    """A copy in which each tensor is one value of its own, expanded, to be filled: none are copied to be replaced."""
    memo: dict[int, Any] = {}
    for _, v in tensors_of(model):
        empty = torch.empty((), dtype=v.dtype, device=_device(v)).expand(v.shape)
        memo[id(v)] = nn.Parameter(empty, requires_grad=False) if isinstance(v, nn.Parameter) else empty
    return copy.deepcopy(model, memo)


def _default_device(model: nn.Module) -> torch.device:
    """Where an output quantizer's scale goes, which has no tensor of the network in its place."""
    return next((_device(v) for _, v in tensors_of(model)), torch.device("cpu"))


def _device(v: Any) -> torch.device:
    """Where the tensor that takes the place of ``v`` goes."""
    device: torch.device = v.device
    return torch.device("cpu") if device.type == "meta" else device


def _as_float(module: QuantizedModule) -> nn.Module:
    """The layer that a quantized one was made from."""
    kind = next(kind for kind, quantized in QUANTIZED.items() if quantized is type(module))
    layer = kind.__new__(kind)
    layer.__dict__ = {k: v for k, v in vars(module).items() if not k.endswith("_quantizer")}
    layer._modules = {k: v for k, v in module._modules.items() if not k.endswith("_quantizer")}
    return layer


def _swap(model: nn.Module, swapped: dict[nn.Module, nn.Module]) -> nn.Module:
    for parent in [*model.modules(), *swapped.values()]:
        for slot, child in parent._modules.items():
            if child in swapped:
                parent._modules[slot] = swapped[child]
    return swapped.get(model, model)


def _deployed(layer: PackedLayer, source: nn.Module, stored: dict[str, Tensor], device: torch.device) -> DeployLayer:
    assert isinstance(source, QuantizedModule)
    parts: dict[str, Any] = {part: v.to(device) for part, v in parts_of(layer, stored).items()}
    for kind in ("input_quantizer", "output_quantizer"):
        settings = getattr(layer, kind)
        if settings is not None:
            scale = stored[join(layer.names[0], f"{kind}.scale")].to(device)
            parts[kind] = ActivationQuantizer(scale, **settings)
    deployed = DEPLOYED[type(source)](
        source, weight_bits=layer.weight_bits, shift=layer.shift, folded=layer.folded, **parts
    )
    for registry in vars(source):
        if registry.startswith("_forward_"):
            setattr(deployed, registry, getattr(source, registry))
    return deployed


def _separate_tables(result: nn.Module, contents: Contents) -> None:
    """Give tables a weight of their own where the network ties it to others and the file has it alone.

    What a quantized embedding deploys are values of its own scales, whatever else was trained with its weight.
    """
    modules = dict(modules_of(result))
    stored = {name: tuple(entry.names) for entry in contents.tensors for name in entry.names}
    for names, v in tensors_of(result):
        entries = {stored.get(name, ()) for name in names}
        for together in entries if len(entries) > 1 else ():
            places = [(modules.get(prefix), name) for prefix, _, name in (n.rpartition(".") for n in together)]
            if all(type(module) in TABLES.values() for module, _ in places):
                own = nn.Parameter(v.detach(), requires_grad=False)
                for module, name in places:
                    setattr(module, name, own)


def _fill(result: nn.Module, contents: Contents, originals: dict[str, Tensor]) -> None:
    """Give every tensor outside of the deployed layers its values, and see that none is missing or left over."""
    empty = {name: v for names, v in tensors_of(result) for name in names}
    stored = {name for entry in contents.tensors for name in entry.names}
    for name in empty:
        if name not in stored:
            raise ValueError(f"the file has no entry for {name!r}, which the network has. {_WRONG_ARCHITECTURE}")
    filled: set[int] = set()
    for entry in contents.tensors:
        v, targets = entry.tensor, dict[int, tuple[str, Tensor]]()
        for name in entry.names:
            if name not in empty:
                raise ValueError(
                    f"the file has an entry for {name!r}, which the network does not have. {_WRONG_ARCHITECTURE}"
                )
            if name in originals:
                targets[id(empty[name])] = name, empty[name]
                if originals[name].shape != v.shape:
                    shapes = f"{tuple(originals[name].shape)} in the network and {tuple(v.shape)} in the file"
                    raise ValueError(f"{name!r} has the shape {shapes}. {_WRONG_ARCHITECTURE}")
        for key, (name, target) in targets.items():
            if key in filled:
                raise ValueError(f"{name!r} is another tensor under another name in the network. {_WRONG_ARCHITECTURE}")
            filled.add(key)
            target.data = v.to(target.device)

"""``load_packed``: a file of ``save_packed`` as a network again."""

from __future__ import annotations

import copy
import os
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ...quant.graph.forward_around import CHILD, ForwardAround
from ...quant.graph.norm import computes_norm, is_batch_norm
from ...quant.graph.output_hook import attach, detach, modules_with_output_quantizer
from ...quant.nn.attention import disable_fast_paths
from ...quant.nn.base import QuantizedModule
from ...quant.nn.registry import float_class, inner_class, quantized_class
from ..atomic_write import file_path
from ..forward_without_norm import ForwardWithoutNorm
from ..module_tree import join, replace_modules, shared_tensors
from ..nn.activation_quantizer import ActivationQuantizer, QuantDequant
from ..nn.base import DeployLayer
from ..nn.linear import route_deployed_layers
from ..nn.registry import DeployedModule, deployed_class
from .manifest import read_packed, refuse_foreign, stored_tensors

_WRONG_ARCHITECTURE = "The file was saved from another architecture"


def load_packed(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Read a file of :func:`~gaqat_optim.save_packed`: the network computes what the saved one does, bit for bit.

    The file is JSON and numbers, and nothing in it is executed. It is checked against its SHA-256 first. The checksum
    finds damage, not malice: whoever can write the file can write other weights with their checksum.

    The file is mapped into memory instead of being read into it, so a large one is there once, as the network's
    tensors. These are copies and no views of the file, because bit planes have to be unpacked into int8.

    Args:
        model: a network of the same architecture, in floating point or from :func:`~gaqat_optim.quantize_model`, with
            any values; the meta device will do. It stays as it is. The code, plain attributes such as a BatchNorm's
            eps, hooks, and the device of each tensor come from it (the CPU for the meta device).
        path: the file.

    Returns:
        The network that :func:`~gaqat_optim.convert` makes of the saved one: a new one, in evaluation mode and without
        gradients.

    Raises:
        ImportError: the extra ``[packed]`` is not installed.
        TypeError: ``model`` is no module.
        ValueError: the file is not from :func:`~gaqat_optim.save_packed`, is of another version of the format, is
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
    if any(isinstance(module, DeployedModule) for module in model.modules()):
        raise ValueError("the model is converted already: load_packed takes the float network, or the quantized one")
    entries, tensors = read_packed(file_path(path))
    network = _empty_copy(model)
    for module in list(modules_with_output_quantizer(network)):
        detach(module)
    with refuse_foreign(path):
        entry_of = {name: entry for entry in entries for name in entry["names"] if entry["kind"] != "QuantDequant"}
        outputs = [(entry["names"][0], entry) for entry in entries if entry["kind"] == "QuantDequant"]
    built: dict[str, nn.Module] = {}  # by first name in the file, where two layers of the network can be one

    def deployed(name: str, module: nn.Module) -> nn.Module:
        entry = None if isinstance(module, DeployedModule) else entry_of.get(name)
        if entry is None:
            return _float_layer(module) if isinstance(module, QuantizedModule) else module
        if entry["kind"] == "Identity":
            return _identity(name, module)
        first = entry["names"][0]
        if entry["kind"] == "ForwardWithoutNorm":
            with refuse_foreign(path):
                return built.setdefault(first, ForwardWithoutNorm(module, entry["positions"]))
        is_around = inner_class(type(module)) is not None
        if is_around != (entry["kind"] == "ForwardAround"):
            _require_equal(name, "is", f"a {type(module).__name__}", f"a {entry['kind']}")
        if is_around:
            child_name = join(name, CHILD)
            with refuse_foreign(path):
                child_entry = entry_of[child_name]
            return built.setdefault(first, ForwardAround.of(module, layer(child_name, module, child_entry)))
        return layer(name, module, entry)

    def layer(name: str, module: nn.Module, entry: dict[str, Any]) -> nn.Module:
        first = entry["names"][0]
        prefix = join(first, "")
        own = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
        _check_layer(name, module, entry, own)
        with refuse_foreign(path):
            replacement: DeployedModule = _deployed_class(module).from_dict(module, entry, own)
        return built.setdefault(first, replacement.to(next(module.parameters()).device))

    network = replace_modules(network, deployed)
    disable_fast_paths(network, DeployLayer)
    modules = dict(network.named_modules(remove_duplicate=False))
    for name, entry in entry_of.items():
        _require_equal(name, "is", f"a {entry['kind']}" if name in modules else "no module", f"a {entry['kind']}")
        if entry["kind"] != "Identity" and modules[name] is not built.get(entry["names"][0]):
            raise ValueError(f"{name!r} is another layer under another name in the network. {_WRONG_ARCHITECTURE}")
    device = next((tensor.device for _, tensor in shared_tensors(network)), None)
    for name, entry in outputs:
        host = name.rpartition(".")[0]
        _require_equal(host, "is", "a module" if host in modules else "no module", "a module")
        with refuse_foreign(path):
            scale = tensors[f"{name}.quantizer.scale"]
            quantizer = ActivationQuantizer(scale, entry["bits"], entry["zero_point"], entry["name"])
        attach(modules[host], QuantDequant(quantizer).to(device))
    _fill(network, tensors)
    route_deployed_layers(network)
    return network.eval().requires_grad_(False)


def _require_equal(name: str, what: str, in_network: Any, in_file: Any) -> None:
    if in_network != in_file:
        raise ValueError(
            f"{name!r} {what} {in_network} in the network and {in_file} in the file. {_WRONG_ARCHITECTURE}"
        )


def _empty_copy(model: nn.Module) -> nn.Module:
    """A copy of a network whose tensors have a shape and no values.

    ``copy.deepcopy`` takes from its memo, by the id of the original, what it has copied already. Here the memo holds a
    replacement of every tensor: one value, expanded to the shape. So no weights are copied only to be replaced,
    and a network on the meta device gets tensors on the CPU.
    """
    memo: dict[int, Any] = {}
    for _, tensor in shared_tensors(model):
        if not is_lazy(tensor):
            device = "cpu" if tensor.is_meta else tensor.device
            empty = torch.empty((), dtype=tensor.dtype, device=device).expand(tensor.shape)
            is_parameter = isinstance(tensor, nn.Parameter)
            memo[id(tensor)] = nn.Parameter(empty, requires_grad=False) if is_parameter else empty
    return copy.deepcopy(model, memo)


def _deployed_class(layer: nn.Module) -> Any:
    """The deployed class of a float or quantized layer, or ``None``."""
    quantized = type(layer) if isinstance(layer, QuantizedModule) else quantized_class(type(layer))
    return None if quantized is None else deployed_class(quantized)


def _check_layer(name: str, layer: nn.Module, entry: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Raise if ``layer`` of the network is not the one that was saved."""
    cls = _deployed_class(layer)
    kind = type(layer).__name__ if cls is None or cls.__name__ != entry["kind"] else entry["kind"]
    _require_equal(name, "is", f"a {kind}", f"a {entry['kind']}")
    weight = next((tensors[slot] for slot in ("codes", "float_weight", "weight") if slot in tensors), None)
    if weight is not None:
        _require_equal(name, "has a weight of shape", tuple(layer.weight.shape), tuple(weight.shape))  # type: ignore[arg-type]
    _require_equal(name, "has", cls.hyperparameters_of(layer), entry.get("hyperparameters"))
    if not entry.get("folded_axes", True):
        biases = [getattr(layer, "bias", None) is not None, not tensors.keys().isdisjoint({"bias_codes", "float_bias"})]
        _require_equal(name, "has", *("a bias" if has_bias else "no bias" for has_bias in biases))


def _identity(name: str, module: nn.Module) -> nn.Module:
    """An identity in the place of a folded BatchNorm, or the identity that is there."""
    if not (isinstance(module, nn.Identity) or is_batch_norm(module) or computes_norm(module)):
        _require_equal(name, "is", f"a {type(module).__name__}", "an Identity or a folded BatchNorm")
    return module if type(module) is nn.Identity else nn.Identity()


def _float_layer(quantized: QuantizedModule) -> nn.Module:
    """The float layer that a quantized one was made from, with its parameters."""
    kind = float_class(type(quantized))
    layer = kind.__new__(kind)
    layer.__dict__ = {name: value for name, value in vars(quantized).items() if not name.endswith("_quantizer")}
    layer._modules = {slot: child for slot, child in quantized._modules.items() if not slot.endswith("_quantizer")}
    return layer


def _fill(network: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Give every tensor of the network its values from the file, on the device of the network."""
    targets = {name: target for names, target in stored_tensors(network) for name in names}
    filled: dict[int, Tensor] = {}
    for name in [*targets, *tensors]:
        own, stored = ("a tensor" if name in named else "no tensor" for named in (targets, tensors))
        _require_equal(name, "is", own, stored)
        target, tensor = targets[name], tensors[name]
        _require_equal(name, "has the shape", tuple(target.shape), tuple(tensor.shape))
        if filled.setdefault(id(target), tensor) is not tensor:
            raise ValueError(f"{name!r} is another tensor under another name in the network. {_WRONG_ARCHITECTURE}")
        target.data = tensor.to(target.device)

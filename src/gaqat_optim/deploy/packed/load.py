"""``load_packed``: a file of ``save_packed`` as a network again."""

from __future__ import annotations

import copy
import json
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from ...quant.graph.output_quantizers import attach, detach, modules_with_output_quantizer
from ...quant.nn.attention import disable_fast_paths
from ...quant.nn.base import QUANTIZED, QuantizedModule
from ..atomic_write import file_path
from ..module_tree import join, replace_modules, shared_tensors
from ..nn.activation_quantizer import ActivationQuantizer, QuantDequant
from ..nn.base import DeployLayer
from ..nn.registry import DeployedModule, deployed_class
from .manifest import FORMAT, METADATA_KEY, content_digest, decode_tensor, stored_tensors

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
    if any(isinstance(module, DeployedModule) for module in model.modules()):
        raise ValueError("the model is converted already: load_packed takes the float network, or the quantized one")
    target = file_path(path)
    shown = repr(str(target))
    entries, tensors = _read(target, shown)
    network = _empty_copy(model)
    for module in list(modules_with_output_quantizer(network)):
        detach(module)
    network = _with_deployed_modules(network, entries, tensors, shown)
    disable_fast_paths(network, DeployLayer)
    _attach_output_quantizers(network, entries, tensors, shown)
    _fill(network, tensors)
    return network.eval().requires_grad_(False)


def _read(target: Path, shown: str) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """The entries of the modules, and the tensors by all their names, as copies on the CPU."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        message = 'load_packed needs safetensors: pip install "gaqat-optim[packed]"'
        raise ImportError(message, name="safetensors") from error
    with open(target, "rb") as raw:
        data = mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_READ) if os.fstat(raw.fileno()).st_size else b""
    try:
        with safe_open(str(target), "pt") as file:
            manifest = _checked_manifest(shown, (file.metadata() or {}).get(METADATA_KEY), data)
            with _refuse_foreign(shown):
                entries = [
                    {**entry, "names": list(entry["names"]), "kind": entry["kind"]} for entry in manifest["modules"]
                ]
                tensors: dict[str, Tensor] = {}
                for key in file.keys():  # noqa: SIM118 (no dictionary)
                    encoding = manifest["tensors"].get(key, {})
                    tensor = decode_tensor(file.get_tensor(key), encoding)
                    tensors |= dict.fromkeys(encoding.get("names", [key]), tensor)
            return entries, tensors
    except SafetensorError as error:
        raise ValueError(f"{shown} is not a packed network, or was cut off, or is damaged: {error}") from error


def _checked_manifest(shown: str, text: str | None, data: Any) -> dict[str, Any]:
    """The manifest of a file of this format that is not damaged."""
    if text is None:
        raise ValueError(f"{shown} is not a packed network: its header has no entry {METADATA_KEY!r}")
    with _refuse_foreign(shown):
        manifest: dict[str, Any] = json.loads(text)
        number, digest = manifest["format"], manifest["sha256"].encode()
    if number != FORMAT:
        raise ValueError(
            f"{shown} is of version {number} of the format, and this gaqat-optim reads version {FORMAT}: it was "
            "written by a newer gaqat-optim, or is damaged"
        )
    position = data.find(digest)
    if content_digest(data, max(position, 0)).encode() != digest:
        raise ValueError(f"{shown} is damaged: its content does not match its checksum. Save or copy it again")
    return manifest


@contextmanager
def _refuse_foreign(shown: str) -> Iterator[None]:
    """Turn every error into one that says what it means for a file: another program wrote it."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{shown} is not as save_packed writes files: {type(error).__name__}: {error}") from error


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


def _with_deployed_modules(
    network: nn.Module, entries: list[dict[str, Any]], tensors: dict[str, Tensor], shown: str
) -> nn.Module:
    """The network with the deployed modules of the file in their places, and float layers everywhere else."""
    entry_of = {name: entry for entry in entries if entry["kind"] != "QuantDequant" for name in entry["names"]}
    built: dict[str, nn.Module] = {}  # by the first name in the file: several layers of the network can be one there

    def deployed(name: str, module: nn.Module) -> nn.Module:
        entry = entry_of.get(name)
        if entry is None:
            return _float_layer(module) if isinstance(module, QuantizedModule) else module
        if entry["kind"] == "Identity":
            return _identity(name, module)
        first = entry["names"][0]
        prefix = join(first, "")
        own = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        replacement = _deployed(name, module, entry, own, shown)
        return built.setdefault(first, replacement)

    network = replace_modules(network, deployed)
    modules = dict(network.named_modules(remove_duplicate=False))
    for name, entry in entry_of.items():
        if name not in modules:
            raise ValueError(
                f"{name!r} is no module in the network and a {entry['kind']} in the file. {_WRONG_ARCHITECTURE}"
            )
        if entry["kind"] != "Identity" and modules[name] is not built.get(entry["names"][0]):
            raise ValueError(f"{name!r} is another layer under another name in the network. {_WRONG_ARCHITECTURE}")
    return network


def _deployed(
    name: str, module: nn.Module, entry: dict[str, Any], tensors: dict[str, Tensor], shown: str
) -> DeployedModule:
    """The deployed module of an entry, made for the layer ``module`` of the network."""
    quantized = type(module) if isinstance(module, QuantizedModule) else QUANTIZED.get(type(module))
    kind = None if quantized is None else deployed_class(quantized)
    if kind is None or kind.__name__ != entry["kind"]:
        raise ValueError(
            f"{name!r} is a {type(module).__name__} in the network and a {entry['kind']} in the file. "
            f"{_WRONG_ARCHITECTURE}"
        )
    weight = next((tensors[slot] for slot in ("codes", "float_weight", "weight") if slot in tensors), None)
    if weight is not None and weight.shape != module.weight.shape:
        shapes = f"{tuple(module.weight.shape)} in the network and {tuple(weight.shape)} in the file"  # type: ignore[arg-type]
        raise ValueError(f"{name!r} has a weight of shape {shapes}. {_WRONG_ARCHITECTURE}")
    own, stored = kind.hyperparameters_of(module), entry.get("hyperparameters")
    if own != stored:
        raise ValueError(f"{name!r} has {own} in the network and {stored} in the file. {_WRONG_ARCHITECTURE}")
    device = next(module.parameters()).device
    with _refuse_foreign(shown):
        deployed = kind.from_dict(module, entry, {slot: tensor.to(device) for slot, tensor in tensors.items()})
    if isinstance(deployed, DeployLayer) and not deployed.folded:
        has_bias = getattr(module, "bias", None) is not None
        if has_bias != (deployed.bias is not None):
            where = "the network" if has_bias else "the file"
            raise ValueError(f"{name!r} has a bias only in {where}. {_WRONG_ARCHITECTURE}")
    return deployed


def _identity(name: str, module: nn.Module) -> nn.Module:
    """An identity in the place of a folded BatchNorm, or the identity that is there."""
    if not isinstance(module, nn.Identity | _BatchNorm):
        raise ValueError(
            f"{name!r} is a {type(module).__name__} in the network, and an Identity or a folded BatchNorm in the file. "
            f"{_WRONG_ARCHITECTURE}"
        )
    return module if type(module) is nn.Identity else nn.Identity()


def _float_layer(quantized: QuantizedModule) -> nn.Module:
    """The float layer that a quantized one was made from, with its parameters."""
    kind = next(kind for kind, registered in QUANTIZED.items() if registered is type(quantized))
    layer = kind.__new__(kind)
    layer.__dict__ = vars(quantized).copy()
    layer._modules = {slot: child for slot, child in quantized._modules.items() if not slot.endswith("_quantizer")}
    return layer


def _attach_output_quantizers(
    network: nn.Module, entries: list[dict[str, Any]], tensors: dict[str, Tensor], shown: str
) -> None:
    """Put the output quantizers of the file behind their modules."""
    modules = dict(network.named_modules(remove_duplicate=False))
    device = next((tensor.device for _, tensor in shared_tensors(network)), None)
    for entry in entries:
        if entry["kind"] == "QuantDequant":
            name = entry["names"][0]
            host = name.rpartition(".")[0]
            if host not in modules:
                raise ValueError(
                    f"{host!r} has an output quantizer in the file, and is no module. {_WRONG_ARCHITECTURE}"
                )
            with _refuse_foreign(shown):
                scale = tensors[f"{name}.quantizer.scale"].to(device)
                quantizer = ActivationQuantizer(scale, entry["bits"], entry["signed"], entry["name"])
            attach(modules[host], QuantDequant(quantizer))


def _fill(network: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Give every tensor of the network its values from the file. None may be missing or left over."""
    targets = {name: target for names, target in stored_tensors(network) for name in names}
    for name in targets:
        if name not in tensors:
            raise ValueError(f"the file has no entry for {name!r}, which the network has. {_WRONG_ARCHITECTURE}")
    filled: dict[int, Tensor] = {}
    for name, tensor in tensors.items():
        if name not in targets:
            raise ValueError(
                f"the file has an entry for {name!r}, which the network does not have. {_WRONG_ARCHITECTURE}"
            )
        target = targets[name]
        if target.shape != tensor.shape:
            shapes = f"{tuple(target.shape)} in the network and {tuple(tensor.shape)} in the file"
            raise ValueError(f"{name!r} has the shape {shapes}. {_WRONG_ARCHITECTURE}")
        if filled.setdefault(id(target), tensor) is not tensor:
            raise ValueError(f"{name!r} is another tensor under another name in the network. {_WRONG_ARCHITECTURE}")
        target.data = tensor.to(target.device)

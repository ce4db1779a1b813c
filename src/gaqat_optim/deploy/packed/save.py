"""``save_packed``: a converted network in one file, its weights in as many bits as were trained."""

from __future__ import annotations

import json
import os
from typing import Any

from torch import Tensor, nn

from ..atomic_write import file_path, write_atomically
from ..convert import convert
from ..module_tree import join
from ..nn.registry import DeployedModule
from .manifest import (
    FORMAT,
    METADATA_KEY,
    NO_DIGEST,
    content_digest,
    describe_modules,
    encode_tensor,
    import_safetensors,
    stored_tensors,
)


def save_packed(model: nn.Module, path: str | os.PathLike[str]) -> int:
    """Write a quantized network to one file in which a weight costs as many bits as it was trained with.

    The file is a safetensors file. The codes of a layer's weight are stored as bit planes, without the shift that
    :func:`~gaqat_optim.convert` gives them in 8 bits. All other tensors (scales, int32 biases, layers in floating
    point) are stored as they are, to the bit; shared tensors are stored once. The hyperparameters of all deployed
    layers are in the file too. The code of the network is not: :func:`~gaqat_optim.load_packed` takes it from a network
    of the same architecture. Equal networks give equal files. The page "Deployment" of the documentation describes the
    file for readers in other languages.

    Args:
        model: a network from :func:`~gaqat_optim.quantize_model`, with all its scales set, or one from
            :func:`~gaqat_optim.convert`. It stays as it is.
        path: where the file goes. A failure leaves the old file.

    Returns:
        The number of bytes written.

    Raises:
        ImportError: the extra ``[packed]`` is not installed.
        TypeError: ``model`` is no module.
        ValueError: the model cannot be converted, was changed after it was, or has a sparse tensor, a tensor without
            data, or extra state.
        OSError: the folder does not exist, or ``path`` is a folder, or cannot be written.

    Example:
        >>> import tempfile, torch
        >>> from gaqat_optim import QuantConfig, convert, load_packed, quantize_model
        >>> net = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 4))
        >>> config = QuantConfig(3, 8, first_last_bits="same")
        >>> x = torch.rand(16, 256)
        >>> quantized = quantize_model(net, config, calibration=x)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     size = save_packed(quantized, f"{folder}/net.packed")
        ...     loaded = load_packed(net, f"{folder}/net.packed")
        >>> torch.equal(loaded(x), convert(quantized)(x)), size < 4 * 256 * 256 / 9
        (True, True)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"save_packed takes a model from quantize_model or convert, got {type(model).__name__}")
    safetensors = import_safetensors("save_packed")
    target = file_path(path)
    deployed = model if any(isinstance(module, DeployedModule) for module in model.modules()) else convert(model)
    modules = describe_modules(deployed)
    tensors, encodings = _encode(deployed, modules)
    manifest = {"sha256": NO_DIGEST, "format": FORMAT, "modules": modules, "tensors": encodings}
    data: bytes = safetensors.torch.save(tensors, {METADATA_KEY: json.dumps(manifest, separators=(",", ":"))})
    position = data.index(NO_DIGEST.encode())
    digest = content_digest(data, position).encode()
    return write_atomically(target, data[:position] + digest + data[position + len(digest) :])


def _encode(deployed: nn.Module, modules: list[dict[str, Any]]) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """The tensors of the file and their encodings, both by the first name of each tensor."""
    tensors, encodings = {}, {}
    bits_of_codes = {
        join(name, "codes"): (entry["weight_bits"], entry["shift"])
        for entry in modules
        if entry.get("weight_bits") is not None
        for name in entry["names"]
    }
    for names, tensor in stored_tensors(deployed):
        key = names[0]
        tensors[key], encoding = encode_tensor(key, tensor, *bits_of_codes.get(key, (None, 0)))
        if len(names) > 1:
            encoding["names"] = names
        if encoding:
            encodings[key] = encoding
    return tensors, encodings

"""``save_packed``: a converted network in one file, its weights in as many bits as were trained."""

from __future__ import annotations

import json
import os
from typing import Any

from torch import Tensor, nn

from ..atomic_write import writable_path, write_atomically
from ..convert import convert
from ..module_tree import join
from ..nn.registry import DeployedModule
from .manifest import FORMAT, METADATA_KEY, NO_DIGEST, content_digest, describe_modules, encode_tensor, stored_tensors


def save_packed(model: nn.Module, path: str | os.PathLike[str]) -> int:
    """Write a quantized network to one file in which a weight costs as many bits as it was trained with.

    The codes of a layer's weight are stored as bit planes (``deploy.bits``), without the shift that
    :func:`~gaqat_optim.convert` gives them in 8 bits. Everything else, scales and int32 biases and what is not
    quantized, is stored as it stands in memory, to the bit; tensors that are shared are stored once. The settings of
    all layers are in the file too. The code of the network is not: :func:`~gaqat_optim.load_packed` takes it from a
    network of the same architecture. Equal networks give equal files.

    Args:
        model: a network from :func:`~gaqat_optim.quantize_model`, with all its scales set, or one from
            :func:`~gaqat_optim.convert`. It stays as it is.
        path: where the file goes. It appears when it is complete: a failure leaves what was there before.

    Returns:
        The number of bytes written.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: the model cannot be converted, was changed after it was, or has something that no file holds: a
            sparse tensor, one without data, extra state.
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
    try:
        from safetensors.torch import save
    except ImportError as error:
        message = 'save_packed needs safetensors: pip install "gaqat-optim[packed]"'
        raise ImportError(message, name="safetensors") from error
    target = writable_path(path)
    deployed = model if any(isinstance(module, DeployedModule) for module in model.modules()) else convert(model)
    modules = describe_modules(deployed)
    tensors, encodings = _encode(deployed, modules)
    manifest = {
        "sha256": NO_DIGEST,
        "format": FORMAT,
        "modules": modules,
        "tensors": encodings,
    }
    data = save(tensors, {METADATA_KEY: json.dumps(manifest, separators=(",", ":"))})
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

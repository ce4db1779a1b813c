"""``save_packed``: a converted network in one file, its weights in as many bits as were trained."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path

from torch import nn

from ..convert import convert
from ..nn.layers import DeployLayer
from .container import Stored, write
from .manifest import (
    attentions_of,
    join,
    layers_of,
    modules_of,
    outputs_of,
    tensors_of,
)


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
    target = packed_path(path)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"the folder of {str(target)!r} does not exist")
    deployed = model if any(isinstance(m, DeployLayer) for m in model.modules()) else convert(model)
    layers = layers_of(deployed)
    tensors = []
    packed = {join(n, "codes"): (x.weight_bits, x.shift) for x in layers if x.weight_bits is not None for n in x.names}
    for names, v in tensors_of(deployed):
        bits, shift = packed.get(names[0], (None, 0))
        tensors.append(Stored(names, v, bits, shift))
    settings = {
        "model": type(deployed).__name__,
        "layers": [asdict(layer) for layer in layers],
        "outputs": [asdict(output) for output in outputs_of(deployed)],
        "attentions": [asdict(attention) for attention in attentions_of(deployed)],
        "identities": [name for name, module in modules_of(deployed) if type(module) is nn.Identity],
    }
    return write(target, settings, tensors)


def packed_path(path: str | os.PathLike[str]) -> Path:
    """``path``, if it is no folder."""
    target = Path(path)
    if target.is_dir():
        raise IsADirectoryError(f"{str(target)!r} is a folder: path must name a file")
    return target

"""The manifest of a packed file: its deployed modules, and how its tensors are encoded.

A packed file is a safetensors file. Its header has one metadata entry, ``gaqat-optim``, with the manifest as JSON. The
manifest is described in the documentation, on the page "Deployment".
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...quant.graph.forward_around import ForwardAround
from ...quant.nn.base import QuantizedModule
from ..bit_planes import pack_bits, unpack_bits
from ..forward_without_norm import ForwardWithoutNorm
from ..module_tree import shared_tensors
from ..nn.activation_quantizer import QuantDequant
from ..nn.base import DeployLayer
from ..nn.registry import DeployedModule

METADATA_KEY, FORMAT = "gaqat-optim", 1
NO_DIGEST = "0" * 64  # in the place of the checksum while the file is hashed

_COMPLEX = (torch.complex64, torch.complex128)
_DTYPES = (
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, *_COMPLEX),
)


def describe_modules(deployed: nn.Module) -> list[dict[str, Any]]:
    """The entries of deployed modules, forwards around or without one, identities, and other output quantizers."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in deployed.named_modules(remove_duplicate=False):
        if isinstance(module, QuantizedModule):
            raise ValueError(
                f"{name!r} is quantized and not converted, beside layers that are: convert the whole model"
            )
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise ValueError(f"{name!r} has extra state ({type(module).__name__}.get_extra_state), which no file holds")
        names.setdefault(module, []).append(name)
    entries = []
    for module, module_names in names.items():
        if isinstance(module, DeployedModule):
            _check_unchanged(module_names[0], module)
            entries.append({"names": module_names, "kind": type(module).__name__, **module.to_dict()})
        elif isinstance(module, QuantDequant):
            entries.append({"names": module_names, "kind": "QuantDequant", **module.quantizer.to_dict()})
        elif isinstance(module, ForwardAround):
            entries.append({"names": module_names, "kind": "ForwardAround"})
        elif isinstance(module, ForwardWithoutNorm):
            entries.append({"names": module_names, "kind": "ForwardWithoutNorm", "positions": list(module.positions)})
    identities = [name for module in names if type(module) is nn.Identity for name in names[module]]
    return [*entries, {"names": identities, "kind": "Identity"}]


def _check_unchanged(name: str, layer: DeployedModule) -> None:
    if not isinstance(layer, DeployLayer) or layer.weight_scale is None:
        return
    scale, product = layer.accumulator_scale, None
    if scale is not None:
        assert layer.input_quantizer is not None
        product = layer.input_quantizer.scale * layer.weight_scale
    is_product = scale is None or product is None or (scale.dtype == product.dtype and torch.equal(scale, product))
    if layer.weight_scale.dtype != torch.float32 or not is_product:
        raise ValueError(
            f"{name!r} was changed after convert (by a cast to another dtype?): its weight scale is no longer float32, "
            "or its accumulator scale no longer the product of its scales"
        )


def stored_tensors(deployed: nn.Module) -> Iterator[tuple[list[str], Tensor]]:
    """The parameters and buffers with all their names, without those that the others determine."""
    derived = {id(getattr(m, slot)) for m in deployed.modules() if isinstance(m, DeployLayer) for slot in m.derived}
    return ((names, tensor) for names, tensor in shared_tensors(deployed) if id(tensor) not in derived)


def encode_tensor(name: str, tensor: Tensor, bits: int | None, shift: int) -> tuple[Tensor, dict[str, Any]]:
    """A tensor in the form of the file, and what :func:`decode_tensor` needs to restore it.

    Codes of a weight have ``bits`` bits and are shifted up by ``shift``; ``bits`` is ``None`` for any other tensor.

    >>> stored, encoding = encode_tensor("fc.codes", torch.tensor([[8, -16]], dtype=torch.int8), bits=3, shift=2)
    >>> stored.tolist(), encoding
    ([[0], [1], [2]], {'bits': 3, 'shift': 2, 'shape': [1, 2]})
    >>> decode_tensor(stored, encoding).tolist()
    [[8, -16]]
    """
    if tensor.is_meta:
        raise ValueError(f"{name!r} has no data: it is on the meta device")
    if tensor.dtype not in _DTYPES or tensor.layout != torch.strided:
        raise ValueError(f"{name!r} is a tensor of {tensor.dtype} and {tensor.layout}, which a packed file cannot hold")
    tensor = tensor.detach().cpu().resolve_conj().resolve_neg()
    if bits is not None:
        codes = tensor >> shift
        if bool((codes << shift != tensor).any()):
            raise ValueError(f"{name!r} was changed after convert: it has codes that are no multiples of 2^{shift}")
        planes = torch.from_numpy(pack_bits(codes.numpy(), bits))
        return planes, {"bits": bits, "shift": shift, "shape": list(tensor.shape)}
    encoding: dict[str, Any] = {}
    # The memory order is kept (channels last, say), since the order in which a library adds up can depend on it.
    axes = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    if axes != sorted(axes) and tensor.permute(axes).is_contiguous():
        encoding["axes"], tensor = axes, tensor.permute(axes)
    if tensor.dtype in _COMPLEX:
        encoding["complex"], tensor = True, torch.view_as_real(tensor)
    return tensor.clone(memory_format=torch.contiguous_format), encoding


def decode_tensor(stored: Tensor, encoding: dict[str, Any]) -> Tensor:
    """The tensor of :func:`encode_tensor`, as a copy."""
    if "bits" in encoding:
        codes = unpack_bits(stored.numpy(), encoding["bits"], tuple(encoding["shape"]), signed=True)
        return torch.from_numpy(codes << encoding["shift"])
    tensor = torch.view_as_complex(stored.clone()) if encoding.get("complex") else stored.clone()
    axes = encoding.get("axes", range(tensor.dim()))
    return tensor.permute(sorted(range(tensor.dim()), key=axes.__getitem__))


def content_digest(data: Any, position: int) -> str:
    """The SHA-256 of a file whose own checksum, of 64 hexadecimal digits at ``position``, is replaced by zeros."""
    digest = hashlib.sha256()
    with memoryview(data) as view:
        for part in (view[:position], NO_DIGEST.encode(), view[position + len(NO_DIGEST) :]):
            digest.update(part)
    return digest.hexdigest()


def read_packed(target: Path) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """The entries of the modules, and the tensors by all their names, as copies on the CPU. Raises for other files."""
    safetensors = import_safetensors("load_packed")
    with open(target, "rb") as raw:
        data = mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_READ) if os.fstat(raw.fileno()).st_size else b""
    try:
        with safetensors.safe_open(str(target), "pt") as file:
            manifest = _checked_manifest(target, (file.metadata() or {}).get(METADATA_KEY), data)
            with refuse_foreign(target):
                tensors: dict[str, Tensor] = {}
                for key in file.keys():  # noqa: SIM118 (no dictionary)
                    encoding = manifest["tensors"].get(key, {})
                    tensor = decode_tensor(file.get_tensor(key), encoding)
                    tensors |= dict.fromkeys(encoding.get("names", [key]), tensor)
                return manifest["modules"], tensors
    except safetensors.SafetensorError as error:
        raise ValueError(f"{str(target)!r} is not a packed network, or was cut off or damaged: {error}") from error


def _checked_manifest(target: Path, text: str | None, data: Any) -> dict[str, Any]:
    """The manifest, if the file is of this format and not damaged."""
    if text is None:
        raise ValueError(f"{str(target)!r} is not a packed network: its header has no entry {METADATA_KEY!r}")
    with refuse_foreign(target):
        manifest: dict[str, Any] = json.loads(text)
        version, digest = manifest["format"], manifest["sha256"].encode()
    if version != FORMAT:
        raise ValueError(
            f"{str(target)!r} is of version {version} of the format, and this gaqat-optim reads version {FORMAT}: it "
            "was written by a newer gaqat-optim, or is damaged"
        )
    if content_digest(data, max(data.find(digest), 0)).encode() != digest:
        raise ValueError(f"{str(target)!r} is damaged: its content does not match its checksum. Save or copy it again")
    return manifest


@contextmanager
def refuse_foreign(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn every error into one that says what it means for a file with a checksum: another program wrote it."""
    try:
        yield
    except Exception as error:
        raise ValueError(
            f"{str(path)!r} is not as save_packed writes files: {type(error).__name__}: {error}"
        ) from error


def import_safetensors(function: str) -> Any:
    """The package that ``function`` needs, or an error that names the extra."""
    try:
        import safetensors.torch
    except ImportError as error:
        message = f'{function} needs safetensors: pip install "gaqat-optim[packed]"'
        raise ImportError(message, name="safetensors") from error
    return safetensors

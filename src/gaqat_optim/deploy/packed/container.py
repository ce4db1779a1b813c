"""One file of tensors and JSON, with a checksum: what :mod:`gaqat_optim.deploy.packed.save` writes.

All numbers are little-endian::

    0   7 bytes   "GAQATPK"
    7   1 byte    version of the format
    8   8 bytes   length of the header, padded with spaces so that the blocks begin at a multiple of 8
    16  8 bytes   length of the file
    24            the header, JSON in UTF-8
                  the blocks, each at a multiple of 8: bit planes of codes, or the values of a tensor
    -32 32 bytes  SHA-256 of all that comes before
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import struct
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..bit_planes import pack_bits, plane_bytes, unpack_bits

_MAGIC, _FORMAT = b"GAQATPK", 1
_PREFIX = struct.Struct("<7sBQQ")
_DIGEST = hashlib.sha256().digest_size
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.complex64),
        *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex128),
    )
}


@dataclass(frozen=True)
class Stored:
    """A tensor with all the names that it has; ``bits``: stored as planes of int8 codes that are shifted up."""

    names: list[str]
    tensor: Tensor
    bits: int | None = None
    shift: int = 0


@dataclass(frozen=True)
class _Block:
    """A tensor in the file: what it is, and where its bytes are, counted from the end of the header."""

    names: list[str]
    dtype: str
    shape: list[int]
    stride: list[int]
    bits: int | None
    shift: int
    offset: int
    size: int


def write(target: Path, settings: dict[str, Any], tensors: list[Stored]) -> int:
    """Write a file, under another name first: there is the whole file or none.

    Args:
        target: where it goes.
        settings: what JSON can hold.
        tensors: on any device.

    Returns:
        The size of the file.

    Raises:
        ValueError: a tensor that the format does not have, or codes that do not have the width given.
        OSError: the file cannot be written.
    """
    blocks, end = [], 0
    for stored in tensors:
        blocks.append(_block(stored, end))
        end = _aligned(end + blocks[-1].size)
    header = {"format": _FORMAT, "gaqat-optim": _version(), **settings, "tensors": [asdict(block) for block in blocks]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text = text.ljust(_aligned(len(text)))
    total = _PREFIX.size + len(text) + end + _DIGEST
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        with open(temporary, "wb") as file:
            digest = hashlib.sha256()
            for data in (_PREFIX.pack(_MAGIC, _FORMAT, len(text), total), text, *_data(tensors)):
                digest.update(data)
                file.write(data)
            file.write(digest.digest())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return total


def read(target: Path) -> tuple[dict[str, Any], list[Stored]]:
    """Read a file of :func:`write`, exactly or not at all. Its tensors are copies on the CPU.

    Raises:
        ValueError: it is another file, or of another version of the format, or damaged.
        OSError: there is no such file, or it cannot be read.
    """
    shown = repr(str(target))
    with open(target, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b"")
    if data[: len(_MAGIC)] != _MAGIC:
        raise ValueError(f"{shown} is not a packed network: it does not begin as the files of save_packed do")
    if size < _PREFIX.size + _DIGEST:
        raise ValueError(f"{shown} was cut off: it has only {size} bytes")
    _, number, header_size, expected = _PREFIX.unpack(data[: _PREFIX.size])
    if number != _FORMAT:
        raise ValueError(
            f"{shown} is of version {number} of the format, and gaqat-optim {_version()} reads version {_FORMAT}: "
            "it was written by a newer gaqat-optim, or is damaged"
        )
    if size != expected:
        raise ValueError(f"{shown} has {size} bytes and should have {expected}: it was cut off, or is damaged")
    if hashlib.sha256(data[:-_DIGEST]).digest() != data[-_DIGEST:]:
        raise ValueError(f"{shown} is damaged: its contents do not match its checksum. Save or copy it again")
    try:
        start = _PREFIX.size + header_size
        header = json.loads(bytes(data[_PREFIX.size : start]))
        blocks = [_Block(**entry) for entry in header.pop("tensors")]
        body = data[start:-_DIGEST]
        return header, [Stored(block.names, _tensor(block, body), block.bits, block.shift) for block in blocks]
    except Exception as error:  # The checksum is right: no accident made this file.
        raise ValueError(f"{shown} is not as save_packed writes files: {type(error).__name__}: {error}") from error


def _block(stored: Stored, offset: int) -> _Block:
    v, name = stored.tensor, stored.names[0]
    dtype = str(v.dtype).removeprefix("torch.")
    if v.is_meta:
        raise ValueError(f"{name!r} has no data: it is on the meta device")
    if dtype not in _DTYPES or v.layout != torch.strided:
        raise ValueError(f"{name!r} is a tensor of {v.dtype} and {v.layout}, which a packed file cannot hold")
    if stored.bits is not None and bool((v >> stored.shift << stored.shift != v).any()):
        raise ValueError(f"{name!r} was changed after convert: it has codes that are no multiples of 2^{stored.shift}")
    size = v.numel() * v.element_size() if stored.bits is None else stored.bits * plane_bytes(v.numel())
    return _Block(stored.names, dtype, list(v.shape), list(_flat(v)[1]), stored.bits, stored.shift, offset, size)


def _data(tensors: list[Stored]) -> Iterator[Any]:
    """The bytes of the blocks, of one after the other."""
    for stored in tensors:
        flat, _ = _flat(stored.tensor)
        if stored.bits is None:
            data = flat.view(torch.uint8).numpy()
        else:
            data = pack_bits(flat.numpy() >> stored.shift, stored.bits).reshape(-1)
        yield data
        yield bytes(_aligned(data.size) - data.size)


def _flat(v: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """The values in the order of their addresses, on one axis, and the strides that make the tensor of them again.

    Strides are kept (channels last, say): the order in which a library adds up can depend on them.
    """
    v = v.detach().cpu().resolve_conj().resolve_neg()
    if not v.permute(sorted(range(v.dim()), key=v.stride, reverse=True)).is_contiguous():
        v = v.contiguous()  # It has gaps, or is expanded.
    return v.as_strided((v.numel(),), (1,)), v.stride()


def _tensor(block: _Block, body: memoryview) -> Tensor:
    data, count = np.frombuffer(body, np.uint8, block.size, block.offset), math.prod(block.shape)
    if block.bits is None:
        flat = torch.empty(count, dtype=_DTYPES[block.dtype])
        if data.size != count * flat.element_size():
            raise ValueError(f"{block.names[0]!r} has {data.size} bytes, and the shape {block.shape}")
        flat.view(torch.uint8).numpy()[:] = data
    else:
        codes = unpack_bits(data.reshape(block.bits, plane_bytes(count)), block.bits, (count,), signed=True)
        flat = torch.from_numpy(codes << block.shift)
    return flat.as_strided(block.shape, block.stride)


def _aligned(size: int) -> int:
    return -(-size // 8) * 8


def _version() -> str:
    try:
        return version("gaqat-optim")
    except PackageNotFoundError:
        return "(not installed)"

"""A packed file, read by its description in docs/deployment.md, and written again with a right checksum."""

import hashlib
import json
import struct

import numpy as np
import safetensors.torch

DTYPES = {
    "BOOL": np.bool_,
    "U8": np.uint8,
    "I8": np.int8,
    "I16": np.int16,
    "I32": np.int32,
    "I64": np.int64,
    "F16": np.float16,
    "BF16": np.uint16,
    "F32": np.float32,
    "F64": np.float64,
}
COMPLEX = {"F32": np.complex64, "F64": np.complex128}


def plain_read(data):
    """The manifest, and the tensors by all their names, with numpy alone; a bfloat16 as its 16 bits."""
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    manifest = json.loads(header.pop("__metadata__")["gaqat-optim"])
    digest = manifest["sha256"].encode()
    assert hashlib.sha256(data.replace(digest, b"0" * 64, 1)).hexdigest().encode() == digest
    arrays = {}
    for key, entry in header.items():
        begin, end = (8 + size + offset for offset in entry["data_offsets"])
        stored = np.frombuffer(data[begin:end], DTYPES[entry["dtype"]]).reshape(entry["shape"])
        encoding = manifest["tensors"].get(key, {})
        array = _decoded(stored, entry["dtype"], encoding)
        arrays |= dict.fromkeys(encoding.get("names", [key]), array)
    return manifest, arrays


def _decoded(stored, dtype, encoding):
    if "bits" in encoding:
        bits, shape = encoding["bits"], encoding["shape"]
        codes = np.zeros(shape, dtype=np.int8).reshape(-1)
        for i in range(codes.size):
            code = sum((int(stored[p, i // 8]) >> i % 8 & 1) << p for p in range(bits))
            codes[i] = (code - 2**bits if code >= 2 ** (bits - 1) else code) * 2 ** encoding["shift"]
        return codes.reshape(shape)
    if encoding.get("complex"):
        stored = np.ascontiguousarray(stored).view(COMPLEX[dtype])[..., 0]
    return stored.transpose(np.argsort(encoding["axes"])) if "axes" in encoding else stored


def rewritten(data, change):
    """The file after ``change(manifest, tensors)``, with the checksum that belongs to it."""
    size = struct.unpack("<Q", data[:8])[0]
    manifest = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["gaqat-optim"])
    stored = safetensors.torch.load(data)
    change(manifest, stored)
    manifest["sha256"] = "0" * 64
    new = safetensors.torch.save(stored, {"gaqat-optim": json.dumps(manifest, separators=(",", ":"))})
    return new.replace(b"0" * 64, hashlib.sha256(new).hexdigest().encode(), 1)

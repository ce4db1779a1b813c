"""The packed file itself: read by its description alone, and refused if one bit of it is wrong."""

import json
import os
import pickle
import struct

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from deploy.packed.packed_files import plain_read, rewritten
from deploy.packed.packed_networks import SAME, network, odd, tensors
from gaqat_optim import quantize_model
from gaqat_optim.deploy.convert import convert
from gaqat_optim.deploy.packed.load import load_packed
from gaqat_optim.deploy.packed.manifest import decode_tensor, encode_tensor
from gaqat_optim.deploy.packed.save import save_packed


@pytest.mark.parametrize("make", [lambda: network("resnet", "W3A3"), odd], ids=["resnet", "odd"])
def test_a_reader_that_knows_the_description_alone_gets_every_tensor(make, tmp_path):
    model = make()
    save_packed(model, tmp_path / "net")
    manifest, arrays = plain_read((tmp_path / "net").read_bytes())
    expected = {name: v for name, v in tensors(convert(model)).items() if not name.endswith("accumulator_scale")}
    assert arrays.keys() == expected.keys()
    for name, v in expected.items():
        assert arrays[name].shape == tuple(v.shape)
        actual = torch.from_numpy(np.ascontiguousarray(arrays[name]).reshape(-1).view(np.uint8).copy())
        assert torch.equal(actual, bytes_of(v)), name
    deployed = dict(convert(model).named_modules(remove_duplicate=False))
    for entry in manifest["modules"]:
        assert {type(deployed[name]).__name__ for name in entry["names"]} <= {entry["kind"]}


def bytes_of(v):
    return v.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)


TENSORS = {
    "scalar": torch.tensor(0.1, dtype=torch.bfloat16),
    "nothing": torch.zeros(0, 3, dtype=torch.float16),
    "turned": torch.randn(4, 3).t(),
    "gaps": torch.randn(4, 6)[:, ::2],
    "expanded": torch.randn(1, 3).expand(2, 3),
    "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "channels last, complex": torch.randn(2, 3, 4, 5, dtype=torch.complex128).to(memory_format=torch.channels_last),
    "conjugated": torch.randn(3, dtype=torch.complex64).conj(),
    "negated": torch._neg_view(torch.randn(3)),
    "special": torch.tensor([np.nan, -0.0, np.inf, 1e-45]),
    "parameter": nn.Parameter(torch.randn(2)),
}


@pytest.mark.parametrize("kind", TENSORS)
def test_a_tensor_is_restored_with_its_values_and_its_memory_order(kind):
    v = TENSORS[kind]
    stored, encoding = encode_tensor("v", v, None, 0)
    assert stored.is_contiguous()
    w = decode_tensor(stored, json.loads(json.dumps(encoding)))
    assert (w.dtype, w.shape) == (v.dtype, v.shape)
    assert torch.equal(bytes_of(w), bytes_of(v))
    if kind == "turned" or kind.startswith("channels last"):
        assert w.stride() == v.stride()


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    path = tmp_path_factory.mktemp("small") / "net.packed"
    model = quantize_model(nn.Sequential(nn.Linear(3, 2)), SAME, calibration=torch.rand(8, 3))
    save_packed(model, path)
    return path.read_bytes()


def refused(data, tmp_path, match=None):
    (tmp_path / "net").write_bytes(data)
    with pytest.raises(ValueError, match=match) as raised:
        load_packed(nn.Sequential(nn.Linear(3, 2)), tmp_path / "net")
    return str(raised.value)


def test_every_byte_counts(small, tmp_path):
    for i in range(len(small)):
        for flip in (0x01, 0x80, 0xFF):
            refused(small[:i] + bytes([small[i] ^ flip]) + small[i + 1 :], tmp_path, "net' (is|has|was)")


def test_a_file_cut_off_anywhere_or_longer(small, tmp_path):
    for length in range(len(small)):
        refused(small[:length], tmp_path, "is not a packed network, or was cut off")
    refused(small + b"\0", tmp_path, "cut off or damaged")
    refused(small + small, tmp_path, "cut off or damaged")


class Bomb:
    def __reduce__(self):
        return os._exit, (3,)


def test_files_of_other_kinds(tmp_path):
    bomb = pickle.dumps(Bomb())
    for data in (b"", b"G", b"a text\n" * 100, bomb, b"\x89HDF\r\n\x1a\n" * 40, struct.pack("<Q", 2) + b"{}" + bomb):
        assert "is not a packed network" in refused(data, tmp_path)
    torch.save(nn.Linear(3, 2).state_dict(), tmp_path / "torch")
    assert "is not a packed network" in refused((tmp_path / "torch").read_bytes(), tmp_path)
    for metadata in (None, {"format": "pt"}):
        data = safetensors.torch.save(nn.Linear(3, 2).state_dict(), metadata)
        assert "is not a packed network: its header has no entry 'gaqat-optim'" in refused(data, tmp_path)
    for text in ("", "{}", "[1]", "null", "[" * 100_000, '{"format":1,"sha256":1}'):
        data = safetensors.torch.save({"v": torch.zeros(1)}, {"gaqat-optim": text})
        assert "is not as save_packed writes files" in refused(data, tmp_path)


def without(key):
    return lambda manifest, stored: stored.pop(key)


CHANGES = {
    "no modules": lambda manifest, stored: manifest.pop("modules"),
    "no tensors": lambda manifest, stored: manifest.pop("tensors"),
    "no names": lambda manifest, stored: manifest["modules"][0].pop("names"),
    "no kind": lambda manifest, stored: manifest["modules"][0].pop("kind"),
    "no hyperparameters": lambda manifest, stored: manifest["modules"][0].pop("hyperparameters"),
    "no bits": lambda manifest, stored: manifest["modules"][0].pop("weight_bits"),
    "no such quantizer": lambda manifest, stored: manifest["modules"][0]["input_quantizer"].update(other=1),
    "another shape": lambda manifest, stored: manifest["tensors"]["0.codes"].update(shape=[2, 4]),
    "nine bits": lambda manifest, stored: manifest["tensors"]["0.codes"].update(bits=9),
    "no axis": lambda manifest, stored: manifest["tensors"].update({"0.weight_scale": {"axes": []}}),
    "another kind": lambda manifest, stored: manifest["modules"][0].update(kind="DeployConv"),
    "no such layer": lambda manifest, stored: manifest["modules"][0].update(names=["7"]),
    "no such norm": lambda manifest, stored: manifest["modules"][1].update(names=["7"]),
    "a layer for a norm": lambda manifest, stored: manifest["modules"][1].update(names=["0"]),
    "an output quantizer nowhere": lambda manifest, stored: manifest["modules"].append(
        {"names": ["7.output_quantizer"], "kind": "QuantDequant", "bits": 4, "zero_point": 8, "name": ""}
    ),
    "an output quantizer without scale": lambda manifest, stored: manifest["modules"].append(
        {"names": ["0.output_quantizer"], "kind": "QuantDequant", "bits": 4, "zero_point": 8, "name": ""}
    ),
    **{f"no {key}": without(key) for key in ("0.codes", "0.weight_scale", "0.bias_codes", "0.input_quantizer.scale")},
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_header_that_no_accident_makes(change, small, tmp_path):
    assert rewritten(small, lambda manifest, stored: None) == small
    refused(rewritten(small, CHANGES[change]), tmp_path)


def test_another_version_of_the_format(small, tmp_path):
    newer = rewritten(small, lambda manifest, stored: manifest.update(format=2))
    refused(newer, tmp_path, "version 2 of the format.*reads version 1: it was written by a newer")

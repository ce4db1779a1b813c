"""``save_packed`` and ``load_packed``: exact or an error, from the bits of a code to a file read in another process."""

import copy
import functools
import hashlib
import json
import os
import pickle
import struct
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from deploy.deploy_networks import CONFIGS, NETWORKS, ResNet, cnn, images, mlp, randomize_norms, trained
from gaqat_optim import QuantConfig, export_onnx, quantize_model
from gaqat_optim.deploy.bit_planes import pack_bits, unpack_bits
from gaqat_optim.deploy.convert import convert
from gaqat_optim.deploy.nn.base import DeployLayer
from gaqat_optim.deploy.packed.load import load_packed
from gaqat_optim.deploy.packed.save import save_packed
from gaqat_optim.quant.nn.base import QuantizedModule

SAME = QuantConfig(4, 4, first_last_bits="same")
CONFIGURATIONS = {
    **CONFIGS,
    "per channel": QuantConfig(3, 5, weight_granularity="channel", first_last_bits="same"),
    "per tensor": QuantConfig(5, 3, weight_granularity="tensor", first_last_bits="same"),
    "weight-only": QuantConfig(4, None, first_last_bits="same"),
    "activation-only": QuantConfig(None, 4, first_last_bits="same"),
    "outputs": QuantConfig(6, 7, output_bits=8),  # Then no BatchNorm is folded.
    "one layer left out": QuantConfig(2, 8, exclude=("*1",)),
}


@functools.cache
def network(name, config):
    return trained(name, CONFIGURATIONS[config], steps=2)


def run(model, x):
    with torch.no_grad():
        return model(x)


def tensors(model):
    """All of them, with those that no state dict has, by all their names."""
    return dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])


def identical(a, b):
    """Whether two networks have the same modules and, to the bit, the same tensors."""
    a_tensors, b_tensors = tensors(a), tensors(b)
    assert str(a) == str(b)
    assert a_tensors.keys() == b_tensors.keys()
    for name, v in a_tensors.items():
        w = b_tensors[name]
        assert (v.dtype, v.shape, type(v), v.requires_grad) == (w.dtype, w.shape, type(w), w.requires_grad), name
        assert torch.equal(v.contiguous().view(-1).view(torch.uint8), w.contiguous().view(-1).view(torch.uint8)), name
    named = [dict(m.named_modules(remove_duplicate=False)) for m in (a, b)]
    assert [type(m) for m in named[0].values()] == [type(m) for m in named[1].values()]
    assert not any(m.training for m in b.modules())
    for v, w in zip(named[0].values(), named[1].values(), strict=True):
        if isinstance(v, DeployLayer):
            fields = ("weight_bits", "shift", "folded", "exact_in_float32")
            assert [getattr(v, f) for f in fields] == [getattr(w, f) for f in fields]
    return True


def snapshot(model):
    return {name: v.clone() for name, v in tensors(model).items()}, str(model), [m.training for m in model.modules()]


def unchanged(model, before):
    after = snapshot(model)
    return after[1:] == before[1:] and all(torch.equal(after[0][name], v) for name, v in before[0].items())


# -- bits -----------------------------------------------------------------------------------------------------------


@st.composite
def codes(draw):
    bits, signed = draw(st.integers(2, 8)), draw(st.booleans())
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    values = draw(st.lists(st.integers(low, high), max_size=40))
    return np.array(values, dtype=np.int8 if signed else np.uint8), bits, signed


def slow_planes(values, bits):
    planes = [[0] * ((len(values) + 7) // 8) for _ in range(bits)]
    for i, value in enumerate(values):
        for p in range(bits):
            planes[p][i // 8] += (value % 2**bits // 2**p % 2) * 2 ** (i % 8)
    return planes


@given(codes())
def test_planes_are_those_of_a_loop_over_bits_and_give_the_codes_back(case):
    values, bits, signed = case
    planes = pack_bits(values, bits)
    assert planes.dtype == np.uint8
    assert planes.tolist() == slow_planes(values.tolist(), bits)
    again = unpack_bits(planes, bits, values.shape, signed)
    assert again.dtype == values.dtype
    assert np.array_equal(again, values)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("signed", [True, False])
def test_every_code_of_a_width_and_every_shape(bits, signed):
    low = -(2 ** (bits - 1)) if signed else 0
    values = np.arange(low, low + 2**bits).astype(np.int8 if signed else np.uint8)
    assert np.array_equal(unpack_bits(pack_bits(values, bits), bits, values.shape, signed), values)
    for shape in ((), (0,), (3, 0, 2), (1,), (3, 5), (2, 3, 3, 1)):
        part = np.resize(values[::-1], shape)
        assert np.array_equal(unpack_bits(pack_bits(part, bits), bits, shape, signed), part)
    turned = np.resize(values, (3, 5)).T
    assert np.array_equal(unpack_bits(pack_bits(turned, bits), bits, (5, 3), signed), turned)


def test_what_is_no_code_is_refused():
    for bits in (1, 9, 0, -1):
        with pytest.raises(ValueError, match="bits must be from 2 to 8"):
            pack_bits(np.zeros(3, dtype=np.int8), bits)
        with pytest.raises(ValueError, match="bits must be from 2 to 8"):
            unpack_bits(np.zeros((3, 1), dtype=np.uint8), bits, (3,), True)
    for value in (4, -5):
        with pytest.raises(ValueError, match=f"of 3 bits must be from -4 to 3; these are from {min(value, 0)}"):
            pack_bits(np.array([0, value], dtype=np.int8), 3)
    with pytest.raises(ValueError, match="must be from 0 to 7"):
        pack_bits(np.array([8], dtype=np.uint8), 3)
    with pytest.raises(TypeError, match="int8 or uint8, got int64"):
        pack_bits(np.array([1]), 3)
    with pytest.raises(ValueError, match=r"have planes of shape \(3, 2\), got \(3, 1\)"):
        unpack_bits(np.zeros((3, 1), dtype=np.uint8), 3, (9,), True)


# -- round trips ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGURATIONS)
@pytest.mark.parametrize("name", NETWORKS)
def test_the_network_comes_back_to_the_bit(name, config, tmp_path):
    model = randomize_norms(copy.deepcopy(network(name, config)))
    model.train()
    before, expected = snapshot(model), convert(model)
    size = save_packed(model, tmp_path / "net.packed")
    assert (tmp_path / "net.packed").stat().st_size == size
    assert unchanged(model, before)
    assert save_packed(expected, tmp_path / "converted.packed") == size
    assert (tmp_path / "converted.packed").read_bytes() == (tmp_path / "net.packed").read_bytes()
    targets = [NETWORKS[name](), model, quantize_model(NETWORKS[name](), QuantConfig(8, None, output_bits=5))]
    for target in targets:
        before = snapshot(target)
        loaded = load_packed(target, tmp_path / "net.packed")
        assert unchanged(target, before)
        assert identical(expected, loaded)
        for x in (images(8), 20 * (images(8) - 0.5)):
            assert torch.equal(run(loaded, x), run(expected, x))
    assert save_packed(loaded, tmp_path / "again.packed") == size
    assert (tmp_path / "again.packed").read_bytes() == (tmp_path / "net.packed").read_bytes()


@settings(max_examples=30)
@given(st.integers(0, 3), st.integers(2, 8), st.sampled_from([None, 2, 5, 8]), st.integers(1, 5), st.booleans())
def test_layers_of_any_shape(tmp_path_factory, spatial, weight_bits, activation_bits, outputs, norm):
    path = tmp_path_factory.mktemp("layers") / "net"
    kinds = [
        functools.partial(nn.Linear, 5),
        *(
            functools.partial(
                c, 4, kernel_size=(2,) * d, padding="same", padding_mode="reflect", groups=1, stride=1, dilation=1
            )
            for d, c in enumerate((nn.Conv1d, nn.Conv2d, nn.Conv3d), 1)
        ),
    ]
    layers = [kinds[spatial](out_features=outputs) if spatial == 0 else kinds[spatial](out_channels=outputs)]
    if norm:
        layers.append((nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[spatial](outputs))
    net = randomize_norms(nn.Sequential(*layers))
    x = torch.randn(4, 5) if spatial == 0 else torch.randn(4, 4, *(4,) * spatial)
    model = quantize_model(net, QuantConfig(weight_bits, activation_bits, first_last_bits="same"), calibration=x)
    save_packed(model, path)
    with torch.no_grad():
        for p in net.parameters():
            p.zero_()
    loaded = load_packed(net, path)
    assert identical(convert(model), loaded)
    assert torch.equal(run(loaded, x), run(convert(model), x))


def test_in_another_process(tmp_path):
    model = network("resnet", "W3A3")
    save_packed(model, tmp_path / "net.packed")
    np.save(tmp_path / "x.npy", images(8).numpy())
    code = (
        "import sys, numpy as np, torch; from deploy.deploy_networks import ResNet; "
        "from gaqat_optim import load_packed; torch.set_num_threads(1); "
        "y = load_packed(ResNet(), 'net.packed')(torch.from_numpy(np.load('x.npy'))); np.save('y.npy', y.numpy())"
    )
    tests = str(Path(__file__).parents[2])
    paths = os.pathsep.join([tests, *(p for p in sys.path if p)])
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": paths}, check=True)
    assert np.array_equal(np.load(tmp_path / "y.npy"), run(convert(model), images(8)).numpy())


def test_channels_without_weights_and_their_biases(tmp_path):
    model = quantize_model(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), SAME, calibration=images(8))
    with torch.no_grad():
        model[1].weight[:2] = torch.tensor([0.0, 1e-30])
        model[1].bias.fill_(0.5)
    with pytest.warns(UserWarning, match="does not fit into int32"):
        save_packed(model, tmp_path / "net")
    with pytest.warns(UserWarning, match="does not fit into int32"):
        expected = convert(model)
    assert not expected[0].codes[:2].any()
    assert identical(expected, load_packed(model, tmp_path / "net"))


class Odd(nn.Module):
    """Tensors of all kinds beside one quantized layer."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.again = self.layer
        self.table = nn.Embedding(5, 6)
        self.tied = nn.Parameter(torch.randn(3, dtype=torch.float64))
        self.also = self.tied
        self.norm = nn.LayerNorm(6)
        self.lstm = nn.LSTM(6, 6, batch_first=True)
        odd = {
            "scalar": torch.tensor(0.1, dtype=torch.bfloat16),
            "nothing": torch.zeros(0, 3, dtype=torch.float16),
            "turned": torch.randn(4, 3).t(),
            "gaps": torch.randn(4, 6)[:, ::2],
            "expanded": torch.randn(1, 3).expand(2, 3),
            "last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
            "one": torch.randn(2, 3, 1, 1).to(memory_format=torch.channels_last),
            "flags": torch.tensor([True, False, True]),
            "complex": torch.randn(3, dtype=torch.complex64).conj(),
            "special": torch.tensor([np.nan, -0.0, np.inf, 1e-45]),
        }
        for name, v in odd.items():
            self.register_buffer(name, v, persistent=name != "gaps")

    def forward(self, tokens):
        return self.lstm(self.norm(self.again(self.layer(self.table(tokens)).relu())))[0]


def odd(config=QuantConfig(3, 4, first_last_bits="same", exclude=("lstm",))):  # noqa: B008 (immutable)
    torch.manual_seed(1)
    return quantize_model(Odd(), config, calibration=torch.randint(5, (16, 3)))


@pytest.fixture
def odd_file(tmp_path):
    save_packed(odd(), tmp_path / "odd")
    return tmp_path / "odd"


def test_tensors_of_all_kinds_and_names(odd_file):
    expected = convert(odd())
    assert identical(expected, load_packed(odd(QuantConfig(8, 8, exclude=("lstm",))), odd_file))
    torch.manual_seed(2)
    loaded = load_packed(Odd(), odd_file)
    assert identical(expected, loaded)
    assert loaded.layer is loaded.again
    assert loaded.tied is loaded.also
    assert loaded.table.weight.is_leaf
    for name in ("last", "one", "turned"):
        assert getattr(loaded, name).stride() == getattr(expected, name).stride()
    tokens = torch.randint(5, (4, 3))
    assert torch.equal(run(loaded, tokens), run(expected, tokens))  # An LSTM has its weights in a list, too.
    header = json.loads(odd_file.read_bytes()[24:].split(b"\0")[0].rpartition(b"}")[0] + b"}")
    assert ["tied", "also"] in [entry["names"] for entry in header["tensors"]]
    assert header["layers"][0]["names"] == ["layer", "again"]


def test_values_that_are_conjugated_or_negated_only_when_they_are_read(tmp_path):
    model = convert(quantize_model(nn.Sequential(nn.Linear(4, 2)), SAME, calibration=torch.rand(8, 4)))
    lazy = torch.randn(3, dtype=torch.complex64).conj()
    model.register_buffer("conjugated", lazy)
    model.register_buffer("negated", torch._neg_view(torch.randn(3)))
    assert model.conjugated.is_conj()
    assert model.negated.is_neg()
    save_packed(model, tmp_path / "net")
    target = nn.Sequential(nn.Linear(4, 2))
    target.register_buffer("conjugated", torch.zeros(3))
    target.register_buffer("negated", torch.zeros(3))
    loaded = load_packed(target, tmp_path / "net")
    assert torch.equal(loaded.conjugated, lazy)
    assert torch.equal(loaded.negated, model.negated)


def test_what_is_one_in_the_file_and_several_in_the_network_has_equal_values(odd_file):
    target = Odd()
    target.also = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    loaded = load_packed(target, odd_file)
    assert torch.equal(loaded.also, loaded.tied)
    assert torch.equal(loaded.tied, odd().tied)


def test_what_is_several_in_the_file_and_one_in_the_network_is_refused(tmp_path):
    apart, one = (nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.LayerNorm(4), nn.LayerNorm(4)) for _ in "ab")
    save_packed(quantize_model(apart, SAME, calibration=torch.rand(8, 4)), tmp_path / "net")
    one[1] = one[0]
    with pytest.raises(ValueError, match="'1' is another layer under another name in the network"):
        load_packed(one, tmp_path / "net")
    apart[2].weight = apart[3].weight
    with pytest.raises(ValueError, match=r"'3\.weight' is another tensor under another name in the network"):
        load_packed(apart, tmp_path / "net")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_networks_of_other_dtypes(dtype, tmp_path):
    x = images(16).to(dtype)
    net = nn.Sequential(nn.GroupNorm(1, 3), *cnn())  # The first one is not folded.
    model = quantize_model(randomize_norms(net).to(dtype), QuantConfig(4, 4, output_bits=8), calibration=x)
    save_packed(model, tmp_path / "net")
    expected = convert(model)
    assert dtype in {v.dtype for v in tensors(expected).values()}
    other = nn.Sequential(nn.GroupNorm(1, 3), *cnn())
    for target in (other.to(dtype), copy.deepcopy(other).float()):
        loaded = load_packed(target, tmp_path / "net")
        assert identical(expected, loaded)
        assert torch.equal(run(loaded, x), run(expected, x))


def test_into_a_network_without_values(tmp_path):
    model = network("resnet", "outputs")
    save_packed(model, tmp_path / "net")
    with torch.device("meta"):
        target = ResNet()
    assert identical(convert(model), load_packed(target, tmp_path / "net"))


def test_a_layer_that_is_the_model(tmp_path):
    model = quantize_model(nn.Linear(6, 3), SAME, calibration=torch.rand(8, 6))
    save_packed(model, tmp_path / "net")
    for target in (nn.Linear(6, 3), model):
        loaded = load_packed(target, tmp_path / "net")
        assert identical(convert(model), loaded)
        assert loaded.input_quantizer.name == "input_quantizer"


def test_a_transformer_does_not_take_its_fast_path_past_the_deployed_layers(tmp_path):
    def encoder():
        return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)

    x = torch.randn(4, 5, 8)
    model = quantize_model(encoder().eval(), QuantConfig(2, 2, exclude=("*self_attn*",)), calibration=x)
    save_packed(model, tmp_path / "net")
    quantized = quantize_model(encoder(), QuantConfig(8, 8))  # Its attention is quantized, and the saved one's is not.
    for target in (encoder(), quantized):
        loaded = load_packed(target, tmp_path / "net")
        assert torch.equal(run(loaded, x), run(convert(model), x))
        assert not any(isinstance(m, QuantizedModule) for m in loaded.modules())


def test_hooks_are_those_of_the_network_that_is_loaded_into(tmp_path):
    save_packed(quantize_model(nn.Sequential(nn.Linear(4, 2)), SAME, calibration=torch.rand(8, 4)), tmp_path / "net")
    target = nn.Sequential(nn.Linear(4, 2))
    target[0].register_forward_pre_hook(lambda module, args: (args[0] * 0,))
    loaded = load_packed(target, tmp_path / "net")
    assert bool((run(loaded, torch.rand(8, 4)) == loaded[0].bias).all())


def test_a_loaded_network_is_copied_pickled_and_exported_like_the_converted_one(tmp_path):
    model, x = network("cnn", "W4A4"), images(8)
    save_packed(model, tmp_path / "net")
    loaded, expected = load_packed(cnn(), tmp_path / "net"), convert(model)
    assert identical(expected, copy.deepcopy(loaded))
    assert identical(expected, pickle.loads(pickle.dumps(loaded)))
    export_onnx(expected, x, tmp_path / "expected.onnx", check=False)
    export_onnx(loaded, x, tmp_path / "loaded.onnx", check=False)
    assert (tmp_path / "expected.onnx").read_bytes() == (tmp_path / "loaded.onnx").read_bytes()


def test_nothing_is_said_where_all_is_well(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_packed(network("cnn", "W4A4"), tmp_path / "net")
        load_packed(cnn(), str(tmp_path / "net"))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_a_weight_costs_its_bits(bits, tmp_path):
    wide = nn.Sequential(nn.Linear(1000, 999, bias=False))
    config = QuantConfig(bits, 8, first_last_bits="same")
    size = save_packed(quantize_model(wide, config, calibration=torch.rand(4, 1000)), tmp_path / "net")
    weights = size - 4 * 999  # Without the scales.
    assert 32 / bits * 0.98 < 4 * 999_000 / weights <= 32 / bits
    print(f"{bits} bits: {4 * 999_000 / size:.3f} times smaller with scales and header, {32 / bits:.3f} at best")


# -- damaged and other files ----------------------------------------------------------------------------------------


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
        refused(small[:length], tmp_path, "is not a packed network|was cut off")
    refused(small[:500], tmp_path, f"has 500 bytes and should have {len(small)}: it was cut off")
    refused(small + b"\0", tmp_path, "cut off, or is damaged")
    refused(small + small, tmp_path, "cut off, or is damaged")


class Bomb:
    def __reduce__(self):
        return os._exit, (3,)


def signed(header, body=b"", version=1):
    """A file with the right lengths and the right checksum."""
    header = header.ljust(-(-len(header) // 8) * 8)
    data = struct.pack("<7sBQQ", b"GAQATPK", version, len(header), 24 + len(header) + len(body) + 32) + header + body
    return data + hashlib.sha256(data).digest()


def test_files_of_other_kinds(tmp_path):
    bomb = pickle.dumps(Bomb())
    for data in (b"", b"G", b"a text\n" * 100, bomb, b"\x89HDF\r\n\x1a\n" * 40):
        assert "is not a packed network" in refused(data, tmp_path)
    torch.save(nn.Linear(3, 2).state_dict(), tmp_path / "torch")
    assert "is not a packed network" in refused((tmp_path / "torch").read_bytes(), tmp_path)
    refused(b"GAQATPK\x01" + bomb, tmp_path, "cut off")
    refused(b"GAQATPK\x01" + bomb * 10, tmp_path, "should have")
    for data in (signed(bomb), signed(b"{}", bomb), signed(b""), signed(b"\xff"), signed(b"[" * 100_000)):
        refused(data, tmp_path, "is not as save_packed writes files")
    refused(signed(b"{}", version=2), tmp_path, "version 2 of the format.*reads version 1: it was written by a newer")


CHANGES = {
    "no layers": lambda h: h.pop("layers"),
    "no identities": lambda h: h.pop("identities"),
    "an unknown field": lambda h: h["layers"][0].update(other=1),
    "beyond the end": lambda h: h["tensors"][0].update(offset=10**6),
    "before the beginning": lambda h: h["tensors"][0].update(offset=-8),
    "another shape": lambda h: h["tensors"][0].update(shape=[2, 4]),
    "strides beyond the end": lambda h: h["tensors"][0].update(stride=[300, 1]),
    "another dtype": lambda h: h["tensors"][1].update(dtype="float64"),
    "one byte": lambda h: h["tensors"][1].update(size=1),
    "no dtype": lambda h: h["tensors"][1].update(dtype="load"),
    "nine bits": lambda h: h["tensors"][0].update(bits=9),
    "another kind": lambda h: h["layers"][0].update(kind="DeployConv"),
    "no such layer": lambda h: h["layers"][0].update(names=["7"]),
    "no such norm": lambda h: h["identities"].append("7"),
    "a layer for a norm": lambda h: h["identities"].append("0"),
    **{f"no tensor {i}": lambda h, i=i: h["tensors"].pop(i) for i in range(4)},
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_header_that_no_accident_makes(change, small, tmp_path):
    size = struct.unpack("<Q", small[8:16])[0]
    header = json.loads(small[24 : 24 + size])
    assert signed(json.dumps(header, separators=(",", ":")).encode(), small[24 + size : -32]) == small
    CHANGES[change](header)
    refused(signed(json.dumps(header).encode(), small[24 + size : -32]), tmp_path)


def test_no_file_and_a_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_packed(cnn(), tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"the folder of .* does not exist"):
        save_packed(network("cnn", "W4A4"), tmp_path / "nowhere" / "net")
    for call in (load_packed, save_packed):
        with pytest.raises(IsADirectoryError, match="is a folder: path must name a file"):
            call(network("cnn", "W4A4"), tmp_path)


@pytest.mark.parametrize("where", ["replace", "fsync"])
def test_a_writing_that_fails_leaves_the_old_file(where, tmp_path, monkeypatch):
    path = tmp_path / "net"
    save_packed(network("mlp", "W4A4"), path)
    before = path.read_bytes()

    def fail(*args):
        raise OSError("no space left")

    with monkeypatch.context() as patched:
        patched.setattr(os, where, fail)
        with pytest.raises(OSError, match="no space left"):
            save_packed(network("cnn", "W4A4"), path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["net"]
    save_packed(network("cnn", "W4A4"), path)
    assert path.read_bytes() != before


def test_what_was_read_does_not_depend_on_the_file_any_more(tmp_path):
    model = network("mlp", "W4A4")
    save_packed(model, tmp_path / "net")
    loaded = load_packed(mlp(), tmp_path / "net")
    (tmp_path / "net").write_bytes(b"")
    assert identical(convert(model), loaded)
    with torch.no_grad():
        for v in tensors(loaded).values():
            v.zero_()


class Tied(nn.Module):
    """Modules that hold one weight, as ``tie`` has it."""

    def __init__(self, tie):
        super().__init__()
        self.words, self.codes, self.bag = nn.Embedding(6, 6), nn.Embedding(6, 6), nn.EmbeddingBag(6, 6)
        self.again = self.words
        self.first, self.head = nn.Linear(6, 6), nn.Linear(6, 6)
        self.attention, self.other = (nn.MultiheadAttention(6, 2, batch_first=True) for _ in "ab")
        for name in tie[1:]:
            module, parameter = name.rsplit(".", 1)
            setattr(self.get_submodule(module), parameter, self.get_parameter(tie[0]))

    def forward(self, tokens):
        x = self.words(tokens) + self.codes(tokens) + self.bag(tokens)[:, None] + self.again(tokens.flip(1))
        x = self.first(x).relu()
        return self.head(self.other(*[self.attention(x, x, x)[0]] * 3)[0])


TIES = {
    "two embeddings": ("words.weight", "codes.weight"),
    "three embeddings": ("words.weight", "codes.weight", "bag.weight"),
    "embedding and head": ("words.weight", "head.weight"),
    "two embeddings and head": ("words.weight", "codes.weight", "head.weight"),
    "two layers": ("first.weight", "head.weight"),
    "two biases": ("first.bias", "head.bias"),
    "attentions": ("attention.in_proj_weight", "other.in_proj_weight"),
    "their out-projections": ("attention.out_proj.weight", "other.out_proj.weight", "words.weight"),
}
LEFT_OUT = {
    "all": (),
    "no head": ("head",),
    "no head and no words": ("head", "words"),
    "no linear layer": ("head", "first"),
}


@pytest.mark.parametrize("left_out", LEFT_OUT)
@pytest.mark.parametrize("tie", TIES)
def test_modules_that_share_a_weight(tie, left_out, tmp_path):
    torch.manual_seed(0)
    tokens = torch.randint(6, (16, 3))
    config = QuantConfig(
        3, 4, first_last_bits="same", exclude=LEFT_OUT[left_out], overrides={"codes": {"weight_bits": 2}}
    )
    model = quantize_model(Tied(TIES[tie]), config, calibration=tokens).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(2):  # Each has a scale of its own, so that the values of one weight differ.
        optimizer.zero_grad()
        model(tokens).square().sum().backward()
        optimizer.step()
    expected = convert(model)
    save_packed(model, tmp_path / "net")
    with torch.device("meta"):
        empty = Tied(TIES[tie])
    for target in (Tied(TIES[tie]), model, quantize_model(Tied(TIES[tie])), Tied(("words.weight",)), empty):
        loaded = load_packed(target, tmp_path / "net")
        assert identical(expected, loaded)
        assert loaded.again is loaded.words
        assert torch.equal(run(loaded, tokens), run(expected, tokens))
        if target is not empty:
            assert torch.equal(run(load_packed(target, tmp_path / "net"), tokens), run(expected, tokens))
    one, other = ([tensors(m)[name] for name in TIES[tie] if name in tensors(m)] for m in (expected, loaded))
    assert [[v is w for w in one] for v in one] == [[v is w for w in other] for v in other]


# -- other architectures, and models that cannot be saved -----------------------------------------------------------


def linear_and_conv(**changes):
    conv = {"kernel_size": 3, "padding": 1} | changes
    return nn.Sequential(nn.Conv2d(3, 4, **conv), nn.BatchNorm2d(4), nn.ReLU(), nn.LayerNorm(8), nn.Linear(8, 2))


def changed(index, module):
    net = linear_and_conv()
    net[index] = module
    return net


OTHERS = {
    r"'0' has .*'stride': \[2, 2\].* in the network and .*'stride': \[1, 1\]": lambda: linear_and_conv(stride=2),
    r"'0' has .*'padding_mode': 'reflect'": lambda: linear_and_conv(padding_mode="reflect"),
    r"'0' has a weight of shape \(4, 3, 5, 5\) in the network and \(4, 3, 3, 3\)": lambda: linear_and_conv(
        kernel_size=5
    ),
    "'0' is a Linear in the network and a DeployConv in the file": lambda: changed(0, nn.Linear(3, 4)),
    "'0' is a LazyConv2d in": lambda: changed(0, nn.LazyConv2d(4, 3)),
    "'0' is no module in the network and a DeployConv": lambda: nn.Module(),
    "'1' is a ReLU in the network, and nothing or a folded BatchNorm": lambda: changed(1, nn.ReLU()),
    r"'3\.weight' has the shape \(9,\) in the network and \(8,\) in the file": lambda: changed(3, nn.LayerNorm(9)),
    r"the file has no entry for '2\.weight', which the network has": lambda: changed(2, nn.PReLU()),
    r"the file has an entry for '3\.bias', which the network does not have": lambda: changed(
        3, nn.LayerNorm(8, bias=False)
    ),
    "'4' has a bias only in the file": lambda: changed(4, nn.Linear(8, 2, bias=False)),
}


@pytest.mark.parametrize("message", OTHERS)
def test_another_architecture_is_refused_and_left_as_it_is(message, tmp_path):
    model = quantize_model(linear_and_conv(), SAME, calibration=images(8))
    save_packed(model, tmp_path / "net")
    target = OTHERS[message]()
    before = str(target)
    with pytest.raises(ValueError, match=f"{message}.*The file was saved from another architecture"):
        load_packed(target, tmp_path / "net")
    assert str(target) == before


def test_a_bias_only_in_the_network(tmp_path):
    save_packed(
        quantize_model(nn.Sequential(nn.Linear(4, 2, bias=False)), calibration=torch.rand(4, 4)), tmp_path / "n"
    )
    with pytest.raises(ValueError, match="'0' has a bias only in the network"):
        load_packed(nn.Sequential(nn.Linear(4, 2)), tmp_path / "n")


def test_models_that_cannot_be_saved_or_loaded_into(tmp_path):
    path, model = tmp_path / "net", network("cnn", "W4A4")
    for call in (load_packed, save_packed):
        with pytest.raises(TypeError, match="got str"):
            call("model", path)
    with pytest.raises(ValueError, match="has no quantized layers: call quantize_model first"):
        save_packed(cnn(), path)
    with pytest.raises(ValueError, match="converted already: load_packed takes the float network"):
        load_packed(convert(model), path)
    deployed = convert(model)
    with pytest.raises(ValueError, match=r"'0' was changed after convert \(by a cast"):
        save_packed(copy.deepcopy(deployed).double(), path)
    broken = copy.deepcopy(deployed)
    broken[3].codes += 1
    with pytest.raises(ValueError, match=r"'3\.codes' was changed after convert: it has codes that are no multiples"):
        save_packed(broken, path)
    broken = convert(network("cnn", "weight-only"))
    broken[3].codes.fill_(100)
    with pytest.raises(ValueError, match="codes of 4 bits must be from -8 to 7"):
        save_packed(broken, path)
    with pytest.raises(ValueError, match="'1' is quantized and not converted"):
        save_packed(nn.Sequential(deployed, model[3]), path)
    with pytest.raises(ValueError, match=r"'1\.weight' has no data"):
        save_packed(nn.Sequential(deployed, nn.LayerNorm(2, device="meta")), path)
    odd_one = nn.Module()
    odd_one.register_buffer("sparse", torch.eye(2).to_sparse())
    with pytest.raises(ValueError, match=r"'1\.sparse' is a tensor of torch\.float32 and torch\.sparse_coo"):
        save_packed(nn.Sequential(deployed, odd_one), path)

    class Extra(nn.Module):
        def get_extra_state(self):
            return {}

    with pytest.raises(ValueError, match="'1' has extra state"):
        save_packed(nn.Sequential(deployed, Extra()), path)
    assert os.listdir(tmp_path) == []

"""``load_packed``: the network that comes back, to the bit, or an error that says where it differs."""

import copy
import functools
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from deploy.deploy_networks import NETWORKS, ResNet, cnn, images, mlp, randomize_norms
from deploy.nn.layer_networks import HEADS, Decoder, E, L, N, S, UNet, ViT, Weights
from deploy.packed.packed_files import rewritten
from deploy.packed.packed_networks import (
    CONFIGURATIONS,
    SAME,
    Bags,
    Odd,
    identical,
    network,
    odd,
    run,
    snapshot,
    tensors,
    unchanged,
)
from gaqat_optim import QuantConfig, export_onnx, quantize_model
from gaqat_optim.deploy.convert import convert
from gaqat_optim.deploy.packed.load import load_packed
from gaqat_optim.deploy.packed.save import save_packed
from gaqat_optim.quant.nn.base import QuantizedModule


def comes_back(model, make, inputs, folder):
    """Whether the file of a network is the same in every way to make it, and gives the same network in every target."""
    before, expected = snapshot(model), convert(model)
    size = save_packed(model, folder / "net.packed")
    content = (folder / "net.packed").read_bytes()
    assert len(content) == size
    assert unchanged(model, before)
    assert save_packed(expected, folder / "converted.packed") == size
    assert (folder / "converted.packed").read_bytes() == content
    for target in (make(), model, quantize_model(make(), QuantConfig(8, None, output_bits=5))):
        before = snapshot(target)
        loaded = load_packed(target, folder / "net.packed")
        assert unchanged(target, before)
        assert identical(expected, loaded)
        for x in inputs:
            for y, z in zip(
                *(y if isinstance(y, tuple) else (y,) for y in (run(loaded, x), run(expected, x))), strict=True
            ):
                assert torch.equal(y, z)
    assert save_packed(loaded, folder / "again.packed") == size
    return (folder / "again.packed").read_bytes() == content


@pytest.mark.cover("values")
@pytest.mark.parametrize("config", CONFIGURATIONS)
@pytest.mark.parametrize("name", NETWORKS)
def test_the_network_comes_back_to_the_bit(name, config, tmp_path):
    model = randomize_norms(copy.deepcopy(network(name, config))).train()
    assert comes_back(model, NETWORKS[name], (images(8), 20 * (images(8) - 0.5)), tmp_path)


FAMILIES = {
    "transposed": (lambda: UNet(groups=2), lambda: torch.rand(8, 3, 9, 8)),
    "vit": (ViT, lambda: torch.randn(8, 3, 8, 8)),
    "decoder": (Decoder, lambda: torch.randn(8, L, E)),
    "attention weights": (Weights, lambda: torch.randn(8, L, E)),
    "embeddings": (Bags, lambda: torch.randint(9, (8, 5))),
}


@pytest.mark.filterwarnings("ignore:Decoder cannot be traced symbolically")
@pytest.mark.cover("values")
@pytest.mark.parametrize("config", [SAME, QuantConfig(6, None, weight_granularity="tensor"), QuantConfig(None, 5)])
@pytest.mark.parametrize("name", FAMILIES)
def test_networks_of_other_layers_come_back_to_the_bit(name, config, tmp_path):
    make, sample = FAMILIES[name]
    x = sample()
    model = quantize_model(randomize_norms(make()), config, calibration=x)
    assert comes_back(model, make, (x, -30 * x) if x.is_floating_point() else (x,), tmp_path)


def test_kdim_and_a_network_that_is_one_attention_layer(tmp_path):
    q, k, v = torch.randn(N, L, E), torch.randn(N, S, 6), torch.randn(N, S, 10)
    model = quantize_model(nn.MultiheadAttention(E, HEADS, kdim=6, vdim=10, batch_first=True), SAME)
    model(q, k, v)
    deployed = convert(model.eval())
    save_packed(model, tmp_path / "net")
    loaded = load_packed(nn.MultiheadAttention(E, HEADS, kdim=6, vdim=10, batch_first=True), tmp_path / "net")
    with torch.no_grad():
        assert torch.equal(loaded(q, k, v)[0], deployed(q, k, v)[0])
    assert sorted(n for n, _ in loaded.named_children()) == ["key", "out_proj", "query", "value"]


@pytest.mark.filterwarnings("ignore:(?s).*BatchNorms that follow quantized layers stay")
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
    # Its attention is quantized, and the saved one's is not.
    quantized = quantize_model(encoder(), QuantConfig(8, 8, first_last_bits="same"))
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


def test_no_file_and_a_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_packed(cnn(), tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"the folder of .* does not exist"):
        save_packed(network("cnn", "W4A4"), tmp_path / "nowhere" / "net")
    for call in (load_packed, save_packed):
        with pytest.raises(IsADirectoryError, match="is a folder: path must name a file"):
            call(network("cnn", "W4A4"), tmp_path)


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


@pytest.mark.filterwarnings("ignore:one weight is quantized in 2 ways:UserWarning")  # by the settings of this test
@pytest.mark.cover("values")
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
    for _ in range(2):  # Where settings differ, so do the codes of one weight.
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
    "'1' is a ReLU in the network and an Identity or a folded BatchNorm in the file": lambda: changed(1, nn.ReLU()),
    r"'3\.weight' has the shape \(9,\) in the network and \(8,\) in the file": lambda: changed(3, nn.LayerNorm(9)),
    r"'2\.weight' is a tensor in the network and no tensor in the file": lambda: changed(2, nn.PReLU()),
    r"'3\.bias' is no tensor in the network and a tensor in the file": lambda: changed(3, nn.LayerNorm(8, bias=False)),
    "'4' has no bias in the network and a bias in the file": lambda: changed(4, nn.Linear(8, 2, bias=False)),
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


TRANSPOSED = {"stride": 2, "output_padding": 1, "groups": 2}
# What is said of a layer that was saved, for another one in its place.
OTHER_LAYERS = {
    "'0' has a bias in the network and no bias in the file": (nn.Linear(4, 4, bias=False), nn.Linear(4, 4)),
    r"'0' has .*'output_padding': \[0\].* in the network and .*'output_padding': \[1\].* in the file": (
        nn.ConvTranspose1d(4, 4, 3, **TRANSPOSED),
        nn.ConvTranspose1d(4, 4, 3, **{**TRANSPOSED, "output_padding": 0}),
    ),
    r"'0' has .*'stride': \[3\].* in the network": (
        nn.ConvTranspose1d(4, 4, 3, **TRANSPOSED),
        nn.ConvTranspose1d(4, 4, 3, **{**TRANSPOSED, "stride": 3}),
    ),
    r"'0' has a weight of shape \(4, 4, 3\) in the network": (
        nn.ConvTranspose1d(4, 4, 3, **TRANSPOSED),
        nn.ConvTranspose1d(4, 4, 3, **{**TRANSPOSED, "groups": 1}),
    ),
    "'0' is a Conv1d in the network and a DeployConvTranspose in the file": (
        nn.ConvTranspose1d(4, 4, 3, **TRANSPOSED),
        nn.Conv1d(4, 4, 3, groups=2),
    ),
    r"'0' has .*'num_heads': 2.* in the network and .*'num_heads': 3.* in the file": (
        nn.MultiheadAttention(E, HEADS),
        nn.MultiheadAttention(E, 2),
    ),
    r"'0' has .*'batch_first': True.* in the network": (
        nn.MultiheadAttention(E, HEADS),
        nn.MultiheadAttention(E, HEADS, batch_first=True),
    ),
    r"'0' has .*'add_zero_attn': True.* in the network": (
        nn.MultiheadAttention(E, HEADS),
        nn.MultiheadAttention(E, HEADS, add_zero_attn=True),
    ),
    "'0.query' has no bias in the network and a bias in the file": (
        nn.MultiheadAttention(E, HEADS),
        nn.MultiheadAttention(E, HEADS, bias=False),
    ),
    r"'0\.bias_k' is a tensor in the network and no tensor in the file": (
        nn.MultiheadAttention(E, HEADS),
        nn.MultiheadAttention(E, HEADS, add_bias_kv=True),
    ),
    "'0' is a Linear in the network and a DeployMultiheadAttention in the file": (
        nn.MultiheadAttention(E, HEADS),
        nn.Linear(E, E),
    ),
    "'0' has .*'mode': 'mean'.* in the network and .*'mode': 'sum'.* in the file": (
        nn.EmbeddingBag(5, 4, mode="sum"),
        nn.EmbeddingBag(5, 4, mode="mean"),
    ),
    r"'0' has a weight of shape \(6, 4\) in the network and \(5, 4\) in the file": (
        nn.Embedding(5, 4),
        nn.Embedding(6, 4),
    ),
}


@pytest.mark.parametrize("message", OTHER_LAYERS)
def test_another_layer_is_refused_and_left_as_it_is(message, tmp_path):
    saved, other = (nn.Sequential(layer) for layer in OTHER_LAYERS[message])
    save_packed(quantize_model(saved, QuantConfig(4, None)), tmp_path / "net")
    before = str(other)
    with pytest.raises(ValueError, match=f"{message}.*The file was saved from another architecture"):
        load_packed(other, tmp_path / "net")
    assert str(other) == before
    with pytest.raises(ValueError, match="'0' is no module in the network and a Deploy"):
        load_packed(nn.Sequential(), tmp_path / "net")


def test_a_file_without_the_layer_of_a_projection_is_refused(tmp_path):
    net = nn.Sequential(nn.MultiheadAttention(E, HEADS))
    save_packed(quantize_model(net, QuantConfig(4, None)), tmp_path / "net")

    def without_query(manifest, stored):
        manifest["modules"] = [entry for entry in manifest["modules"] if entry["names"] != ["0.query"]]

    (tmp_path / "net").write_bytes(rewritten((tmp_path / "net").read_bytes(), without_query))
    with pytest.raises(ValueError, match=r"'0\.query\.weight' is a tensor in the network and no tensor in the file"):
        load_packed(net, tmp_path / "net")


def test_models_that_cannot_be_loaded_into(tmp_path):
    with pytest.raises(TypeError, match=r"load_packed takes the float network.*got str"):
        load_packed("model", tmp_path / "net")
    with pytest.raises(ValueError, match="converted already: load_packed takes the float network"):
        load_packed(convert(network("cnn", "W4A4")), tmp_path / "net")

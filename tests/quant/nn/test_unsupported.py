"""Modules that cannot be quantized are refused, by what they compute."""

import ast
import warnings

import pytest
import torch
from torch import nn

from gaqat_optim import QuantConfig, quantize_model
from gaqat_optim.quant.nn.base import QuantizedModule
from gaqat_optim.quant.nn.unsupported import exclude_argument, unsupported_reason
from quant.nn.attentions import E, attention


def weight_normed():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # deprecated, and in many networks
        return nn.utils.weight_norm(nn.Linear(2, 2))


def test_a_forward_on_the_instance_is_refused():
    layer = nn.Linear(2, 2)
    layer.forward = layer.forward  # as accelerate does it: bound to the layer in floating point
    with pytest.raises(
        ValueError, match=r"'0' cannot be quantized\. Linear has a forward that was put on the instance"
    ):
        quantize_model(nn.Sequential(layer, nn.Linear(2, 2)))
    assert quantize_model(nn.Sequential(layer, nn.Linear(2, 2)), QuantConfig(exclude=("0",)))[0].forward


def test_computed_weights_are_refused():
    hooked = attention()
    with pytest.warns(FutureWarning, match="weight_norm"):
        nn.utils.weight_norm(hooked, "in_proj_weight")
    parametrized = attention()
    nn.utils.parametrizations.weight_norm(parametrized.out_proj)

    class LowRank(nn.Linear):
        pass

    replaced = attention()
    replaced.out_proj = LowRank(E, E)
    for module, words in (
        (hooked, "computes its in_proj_weight in a hook"),
        (parametrized, "a ParametrizedNonDynamicallyQuantizableLinear as out_proj"),
        (replaced, "a LowRank as out_proj"),
    ):
        assert words in unsupported_reason(module)
        with pytest.raises(ValueError, match=words):
            quantize_model(nn.Sequential(module))
    assert unsupported_reason(nn.Linear(2, 2)) is None


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (nn.LSTM(2, 2), "LSTM has its recurrence in one kernel, .* write it with nn.Linear"),
        (nn.GRUCell(2, 2), "GRUCell has its recurrence"),
        (nn.LazyLinear(2), "LazyLinear has no shape yet: run one forward pass"),
        (
            nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)),
            "ParametrizedLinear computes its weight: fold",
        ),
        (weight_normed(), "Linear computes its weight in a hook: .* remove_weight_norm"),
        (nn.Embedding(3, 2, sparse=True), "Embedding has sparse gradients, .* sparse=False"),
        (nn.EmbeddingBag(3, 2, max_norm=1.0), "EmbeddingBag changes its weight .* max_norm=None"),
        (nn.Linear(2, 2, dtype=torch.complex64), "Linear has a parameter of torch.complex64: give it a real"),
        (nn.Linear(2, 2).to(torch.float8_e4m3fn), "Linear has a parameter of torch.float8_e4m3fn: .* 16 bits"),
    ],
)
def test_what_cannot_be_quantized_is_refused_by_name_unless_excluded(module, words):
    model = nn.ModuleDict({"part": module, "head": nn.Linear(2, 2)})
    before = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=rf"'part' cannot be quantized\. {words}.*; or leave .*exclude=\('part',\)"):
        quantize_model(model, inplace=True)
    assert [type(m) for m in model.modules()] == before
    quantized = quantize_model(model, QuantConfig(exclude=("part",)), inplace=True)
    assert type(quantized["part"]) is type(module)
    assert isinstance(quantized["head"], QuantizedModule)


def test_all_refusals_of_a_network_come_at_once_with_one_exclude_that_works():
    hooked = attention()  # refused with its out_proj, which is a refusal of its own
    nn.utils.parametrizations.weight_norm(hooked.out_proj)
    rnn = nn.LSTM(2, 2)
    parts = {"rnn": rnn, "tied": rnn, "words[0]": nn.Embedding(3, 2, sparse=True), "attention": hooked}
    model = nn.ModuleDict({**parts, "head": nn.Linear(2, 2), "left": nn.Linear(2, 2)})
    with pytest.raises(ValueError, match="4 modules cannot be quantized:") as caught:
        quantize_model(model, QuantConfig(exclude=("left",)))
    lines = str(caught.value).splitlines()
    names = ["rnn", "words[0]", "attention", "attention.out_proj"]
    assert [line.split(":")[0].strip() for line in lines[1:-1]] == [repr(name) for name in names]
    exclude = ast.literal_eval(lines[-1].partition("exclude=")[2])
    assert exclude == ("left", *names)
    quantized = quantize_model(model, QuantConfig(exclude=exclude))
    assert [n for n, m in quantized.named_modules() if isinstance(m, QuantizedModule)] == ["head"]


def blocks(count=3):
    return nn.Sequential(*(nn.ModuleDict({"fc": nn.Linear(2, 2), "out": nn.Linear(2, 2)}) for _ in range(count)))


def advice(model, names, exclude=()):
    return ast.literal_eval(exclude_argument(model, names, exclude).removeprefix("exclude="))


def left_in_float(model, exclude):
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    return [name for name, layer in QuantConfig(exclude=exclude).resolve(layers).items() if layer is None]


def test_repeated_blocks_share_a_pattern():
    names = ["0.fc", "1.fc", "2.fc"]
    assert advice(blocks(), names) == ("*.fc",)
    assert left_in_float(blocks(), ("*.fc",)) == names


def test_a_pattern_that_would_match_another_module_is_not_used():
    names = ["0.fc", "2.fc"]
    assert advice(blocks(), names) == ("0.fc", "2.fc")
    assert left_in_float(blocks(), advice(blocks(), names)) == names


def test_a_module_by_another_name_counts_as_another():
    model = blocks(2)
    model.append(nn.ModuleDict({"fc": model[0]["fc"]}))
    assert advice(model, ["0.fc", "1.fc"]) == ("0.fc", "1.fc")


def test_what_is_excluded_already_comes_first():
    assert advice(blocks(), ["0.fc", "1.fc", "2.fc"], exclude=("1.out",)) == ("1.out", "*.fc")

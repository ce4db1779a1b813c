"""A class whose own forward wraps ``super().forward`` is quantized behind it; any other forward of its own is left."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

from gaqat_optim import QuantConfig, convert, quantization_disabled, quantization_summary, quantize_model
from gaqat_optim.quant.nn.base import QuantizedModule
from gaqat_optim.quant.nn.own_forward import functions_of
from gaqat_optim.quant.nn.registry import quantized_class
from quant.nn.own_forwards import WRAPPING, Block, Causal, Dropped, Levels, Middle, Twice, other_ways

CONFIG = QuantConfig(4, 4, first_last_bits="same")


def network(case, config=CONFIG):
    """A block in floating point, the same quantized, and an input."""
    torch.manual_seed(0)
    layer, shape = WRAPPING[case]
    model, x = Block(layer()), torch.randn(shape) if isinstance(shape, tuple) else shape
    return model, quantize_model(model, config, calibration=x), x


@pytest.mark.parametrize("case", WRAPPING)
def test_it_is_quantized_trains_and_is_copied(case):
    model, quantized, x = network(case)
    layer = quantized.layer
    assert isinstance(layer, QuantizedModule)
    assert isinstance(layer, type(model.layer))
    assert layer.weight_quantizer.bits == 4
    assert {*model.state_dict()} <= {*quantized.state_dict()}
    with quantization_disabled(quantized):
        assert torch.equal(quantized.eval()(x), model.eval()(x))
    assert not torch.allclose(quantized(x), model(x))
    quantized.train()(x).square().mean().backward()
    assert all(p.grad is not None for p in quantized.parameters())
    assert quantization_summary(quantized).left_in_float == []
    quantized.eval()
    rebuilt = quantize_model(model, QuantConfig.from_dict(quantized.quant_config.to_dict()))
    rebuilt.load_state_dict(quantized.state_dict())
    for other in (copy.deepcopy(quantized), pickle.loads(pickle.dumps(quantized)), rebuilt.eval()):
        assert type(other.layer) is type(layer)
        assert torch.equal(other(x), quantized(x))


def test_the_whole_model_is_saved(tmp_path):
    _, quantized, x = network("causal")
    torch.save(quantized, tmp_path / "model.pt")
    assert torch.equal(torch.load(tmp_path / "model.pt", weights_only=False)(x), quantized(x))


@pytest.mark.parametrize("kind", other_ways(), ids=lambda kind: kind.__name__)
def test_a_forward_that_computes_in_another_way_is_left(kind):
    assert quantized_class(kind) is None


def test_what_is_left_is_warned_of():
    kind = next(kind for kind in other_ways() if kind.__name__ == "Reads")
    with pytest.warns(UserWarning, match=r"66\.7% of the weights .* 0 \(Reads\)"):
        model = quantize_model(nn.Sequential(kind(8, 8), nn.Linear(8, 4)))
    assert type(model[0]) is kind
    assert quantization_summary(model).left_in_float == ["0 (Reads)"]


def test_the_summary_and_the_configuration_have_the_name_of_the_class():
    config = QuantConfig(4, 4, first_last_bits="same", overrides={Causal: {"weight_bits": 3}})
    _, quantized, x = network("causal", config)
    record = quantization_summary(quantized, x)[0]
    assert (record.name, record.type, record.weight_bits, record.macs) == ("layer", "QuantCausal", 3, 4 * 6 * 3 * 9)
    _, left, _ = network("causal", QuantConfig(4, 4, exclude=("layer",)))
    assert type(left.layer) is Causal


def test_the_first_class_in_the_order_that_is_registered_counts():
    _, quantized, _ = network("around a registered layer")
    assert [cls.__name__ for cls in type(quantized.layer).__mro__[1:3]] == ["AroundRegistered", "QuantRegistered"]


def test_hooks_and_keywords_arrive():
    torch.manual_seed(0)
    layer, x = Dropped(4, 6), torch.randn(8, 4)
    seen = []
    layer.register_forward_hook(lambda module, args, kwargs, y: seen.append(kwargs), with_kwargs=True)
    model = quantize_model(layer, CONFIG, calibration=x).eval()
    seen.clear()
    y, doubled = model(x), model(x, factor=2.0)
    bare = doubled - y  # what the quantized layer gives, times the gain
    assert torch.allclose(y - bare, (layer.offset - layer.bias).expand(8, 6), atol=1e-5)
    assert seen == [{}, {"factor": 2.0}]


def test_an_instance_of_a_class_in_a_function_is_copied_and_as_little_pickled_as_before():
    class Local(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    model = quantize_model(nn.Sequential(Local(4, 3)), calibration=torch.rand(8, 4))
    assert torch.equal(copy.deepcopy(model)(torch.ones(1, 4)), model(torch.ones(1, 4)))
    for module in (Local(4, 3), model):
        with pytest.raises((AttributeError, pickle.PicklingError), match="Local"):
            pickle.dumps(module)


@pytest.mark.parametrize("case", ["causal", "dropout", "levels"])
def test_it_compiles(case):
    _, quantized, x = network(case)
    quantized.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(quantized, backend="eager", fullgraph=True)
        assert torch.allclose(compiled(x), quantized(x), atol=1e-6)


def test_functions_are_followed_by_name_through_classes_and_modules():
    functions = list(functions_of(Levels.forward, [vars(cls) for cls in (Levels, Twice, Middle)]))
    assert len(functions) == 2  # of the mixin and of the middle class
    assert all("super" in function.names for function in functions)


class Table(nn.Linear):
    """Adds a table of its own, which no quantizer sees."""

    def __init__(self):
        super().__init__(4, 3)
        self.table = nn.Parameter(torch.rand(5, 3))

    def forward(self, x):
        return super().forward(x) + self.table[: len(x)]


def test_other_weights_of_the_layer_are_listed_in_floating_point():
    model = quantize_model(nn.Sequential(Table()), calibration=torch.rand(2, 4))
    for network in (model, convert(model)):
        summary = quantization_summary(network, torch.rand(2, 4))
        assert [entry.partition(" ")[0] for entry in summary.left_in_float] == ["0"]
        assert str(summary).splitlines()[-1] == "quantized: 44.4 % of the weights, 100.0 % of the MACs"

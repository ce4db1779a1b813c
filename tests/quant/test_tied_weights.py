"""Layers that share a weight share its quantizer, so that its codes are the same in all of them."""

import copy
import pickle

import pytest
import torch
from torch import nn

from gaqat_optim import QuantConfig, quantize_model, scale_parameters

SAME = QuantConfig(4, 8, first_last_bits="same")


class Language(nn.Module):
    """Embedding, body and head, as a language model has them."""

    def __init__(self, bias=False):
        super().__init__()
        self.words, self.body, self.head = nn.Embedding(12, 6), nn.Linear(6, 6), nn.Linear(6, 12, bias=bias)
        self.head.weight = self.words.weight

    def forward(self, tokens):
        return self.head(self.body(self.words(tokens)).relu())


def tokens():
    return torch.randint(12, (16, 3))


def trained(model, x, steps=2):
    optimizer = torch.optim.Adam(model.train().parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    return model.eval()


def test_one_quantizer_trains_for_both_and_copies_keep_it():
    torch.manual_seed(0)
    x = tokens()
    model = quantize_model(Language(), SAME, calibration=x)
    quantizer = model.words.weight_quantizer
    before = quantizer.scale.detach().clone()
    trained(model, x)
    assert model.head.weight_quantizer is quantizer
    assert not torch.equal(quantizer.scale, before)
    assert torch.equal(model.head.quantized_weight(), model.words.quantized_weight())
    assert [name for name in scale_parameters(model) if "weight" in name] == [
        "words.weight_quantizer.lsq_log_scale",
        "body.weight_quantizer.lsq_log_scale",
    ]
    assert not any(key.startswith("head.weight_quantizer") for key in model.state_dict())
    rebuilt = quantize_model(Language(), model.quant_config)
    rebuilt.load_state_dict(model.state_dict())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), rebuilt.eval()):
        assert other.head.weight_quantizer is other.words.weight_quantizer
        assert torch.equal(other(x), model(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_cast_reaches_both(dtype):
    x = tokens()
    model = quantize_model(Language(), SAME, calibration=x).to(dtype)
    assert model.head.weight_quantizer.scale is not None
    assert model(x).dtype == dtype
    assert model.head.weight_quantizer is model.words.weight_quantizer


@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.*should not be instantiated:DeprecationWarning")
def test_compiled_it_computes_the_same():
    x = tokens()
    model = trained(quantize_model(Language(), SAME, calibration=x), x)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), model(x))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"weight_bits": 8},
            r"'words' \(QuantEmbedding, 4 bits per channel\); 'head' \(QuantLinear, 8 bits per channel\)",
        ),
        ({"weight_granularity": "tensor"}, r"'head' \(QuantLinear, 4 bits per tensor\)"),
        ({"weight_bits": None}, r"'head' \(QuantLinear, floating point\)"),
    ],
)
def test_other_settings_are_a_warning_and_each_has_a_quantizer(settings, said):
    config = QuantConfig(4, 8, first_last_bits="same", overrides={"head": settings})
    with pytest.warns(UserWarning, match=f"one weight is quantized in 2 ways, so that files hold it 2 times: .*{said}"):
        model = quantize_model(Language(), config, calibration=tokens())
    assert model.head.weight_quantizer is not model.words.weight_quantizer


def test_a_layer_that_the_user_leaves_out_is_no_warning():
    model = quantize_model(
        Language(), QuantConfig(4, 8, exclude=("head",)), calibration=tokens()
    )  # warnings are errors
    assert type(model.head) is nn.Linear
    assert model.head.weight is model.words.weight


def test_the_weight_of_a_first_layer_has_its_bits_everywhere():
    class Encoder(Language):
        """Two embeddings with one weight, neither of them called first in the order of modules."""

        def __init__(self):
            super().__init__()
            self.words = nn.Sequential(nn.Embedding(12, 6))
            self.words[0].weight = self.head.weight
            self.again = nn.Linear(6, 12, bias=False)
            self.again.weight = self.head.weight
            self.last = nn.Linear(24, 2)

        def forward(self, tokens):
            x = self.body(self.words(tokens)).relu()
            return self.last(torch.cat([self.head(x), self.again(x)], -1))

    model = quantize_model(Encoder(), QuantConfig(4, 4), calibration=tokens())
    assert [m.weight_quantizer.bits for m in (model.words[0], model.body, model.head, model.again)] == [8, 4, 8, 8]
    assert len({m.weight_quantizer for m in (model.words[0], model.head, model.again)}) == 1


class Attends(nn.Module):
    """The head has the weight of the attention's out-projection."""

    def __init__(self):
        super().__init__()
        self.first, self.attention, self.head = nn.Linear(4, 8), nn.MultiheadAttention(8, 2), nn.Linear(8, 8)
        self.head.weight = self.attention.out_proj.weight

    def forward(self, x):
        h = self.first(x)
        return self.head(self.attention(h, h, h)[0])


def test_the_out_projection_of_an_attention_has_the_bits_of_a_last_layer_with_its_weight():
    model = quantize_model(Attends(), QuantConfig(4, 4), calibration=torch.rand(5, 2, 4))
    assert model.attention.out_proj.weight_quantizer is model.head.weight_quantizer
    assert [q.bits for q in (model.head.weight_quantizer, model.attention.query_weight_quantizer)] == [8, 8]

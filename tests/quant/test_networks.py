"""Every network of the registry, small or torchvision's, through what training code does to networks."""

import copy
import io
import pickle
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.utils.checkpoint import checkpoint

from gaqat_optim import (
    GAQATOptimizer,
    LSQQuantizer,
    QuantConfig,
    quantization_disabled,
    quantization_summary,
    quantize_model,
)
from gaqat_optim.quant.nn.base import QuantizedModule
from oracle.lsq import lsq
from quant import network_oracle
from selection import covering
from small_networks import NETWORKS, TORCHVISION, build

EVERY = [*NETWORKS, *TORCHVISION]
COMPOSED = ("mlp", "conv1d", "transposed conv1d", "resnet", "mobilenet")
ALL = [*NETWORKS, *(pytest.param(name, marks=pytest.mark.slow) for name in TORCHVISION)]
IMAGES = [
    pytest.param(name, marks=[pytest.mark.slow] * (name in TORCHVISION))
    for name, (_, shape) in {**NETWORKS, **TORCHVISION}.items()
    if len(shape) == 3
]
PLAIN = QuantConfig(4, 4, init="lsq")  # its initial scales need no search, where no test looks at them

# One quantized network at a time, shared by the tests that pytest then puts together.
every_network = pytest.mark.parametrize("name", ALL, scope="module")
# Where a network takes seconds: those with a quantized layer or a connection that others do not have.
each_kind_of_network = pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name in COMPOSED or name in TORCHVISION)) for name in EVERY],
    scope="module",
)


@pytest.fixture(scope="module")
def built(name, request):
    """The float network, its quantized copy and inputs, all of them for reading only."""
    if name in TORCHVISION:
        request.getfixturevalue("torchvision")
    torch.set_num_threads(1)  # as all tests have; but this is set up before the fixture that sees to it
    model, x, _ = build(name)
    # Of a copy made here: what quantize_model might do to the original, it has not done to this one yet.
    return model, quantize_model(copy.deepcopy(model), PLAIN, calibration=x, inplace=True), x


@pytest.fixture
def original(built):
    return copy.deepcopy(built[0])


@pytest.fixture
def quantized(built):
    return copy.deepcopy(built[1])


@pytest.fixture
def x(built):
    return built[2].clone()


def gradients(model, run):
    model.zero_grad()
    y = run()
    y.square().mean().backward()
    return y.detach(), {name: p.grad for name, p in model.named_parameters()}


def assert_close(a, b, **tolerance):
    torch.testing.assert_close(a[0], b[0], **tolerance)
    assert a[1].keys() == b[1].keys()
    for name in a[1]:
        torch.testing.assert_close(a[1][name], b[1][name], **tolerance, msg=lambda text, name=name: f"{name}: {text}")


def norms_by_batch(model):
    """Evaluation, but for BatchNorm: the running statistics of an untrained network mean nothing."""
    model.eval()
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.train()
    return model


# -- what it computes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "zero_point"), [(2, 2), (3, 4), (3, 0), (8, 0), (3, 1), (4, 13), (8, 200)])
@pytest.mark.parametrize("scales", [[0.25], [0.3], [0.25, 0.3, 0.07]])
def test_the_oracle_s_composition_is_the_loop_oracle(bits, zero_point, scales):
    qmin, qmax = -zero_point, 2**bits - 1 - zero_point
    codes = [qmin - 3, qmin - 0.5, qmin - 0.2, qmin, qmin + 0.5, -0.5, 0, 0.3, 0.5, 1.5, qmax - 0.5]
    codes += [qmax - 0.2, qmax, qmax + 0.2, qmax + 0.5, qmax + 9]
    scale = torch.tensor(scales, dtype=torch.float64, requires_grad=True)
    v = (torch.tensor(codes, dtype=torch.float64) * scale.detach()[:, None]).requires_grad_()
    grad = torch.randn(v.shape, dtype=torch.float64)
    v_hat = network_oracle.fake_quantize(v, scale[:, None], bits, zero_point, count=len(codes))
    v_hat.backward(grad)
    for row, s in enumerate(scales):
        want = lsq(
            v[row].tolist(),
            [s] * len(codes),
            grad[row].tolist(),
            qmin,
            qmax,
            grad_scale=(len(codes) * max(zero_point - 1, qmax)) ** -0.5,
        )
        assert v_hat[row].tolist() == want[0]
        # Where the derivative is not 0, it is a scale times its inverse.
        assert v.grad[row].tolist() == pytest.approx(want[1], rel=1e-15, abs=0)
        assert scale.grad[row].item() == pytest.approx(sum(want[2]), rel=1e-13)


def test_the_oracle_s_attention_is_torch_s_where_nothing_is_quantized():
    layer = nn.MultiheadAttention(8, 2, batch_first=True, dtype=torch.float64)
    nn.init.normal_(layer.in_proj_bias)
    found = []
    for forward in (layer, network_oracle.attention_forward(layer, {})):
        layer.zero_grad()
        x = torch.linspace(-2, 2, 120, dtype=torch.float64).sin().reshape(3, 5, 8).requires_grad_()
        y, _ = forward(x, x.cos(), x.exp(), need_weights=False)
        y.square().sum().backward()
        found.append((y.detach(), {"x": x.grad, **{name: p.grad.clone() for name, p in layer.named_parameters()}}))
    assert_close(*found, rtol=1e-12, atol=1e-12)


CONFIGS = {
    "W4A4 per channel": QuantConfig(4, 4),
    "W2A8 per tensor, linear": QuantConfig(
        2, 8, weight_granularity="tensor", scale_domain="linear", first_last_bits="same"
    ),
    "W3A4 signed, outputs": QuantConfig(3, 4, activation_signed=True, output_bits=5, first_last_bits=6),
    "A3, outputs": QuantConfig(None, 3, first_last_bits="same", output_bits=6, scale_domain="linear"),
    "W3": QuantConfig(3, None),
}
SMALL = [(name, config) for name in NETWORKS for config in CONFIGS]
KEPT = covering([dict(enumerate(case)) for case in SMALL], 1)
OF_FULL_SIZE = {"resnet18": CONFIGS, "mobilenet_v3_small": CONFIGS, "vit_b_16": ["W4A4 per channel"]}


@pytest.mark.parametrize(
    ("name", "config"),
    [pytest.param(*case, marks=[pytest.mark.slow] * (i not in KEPT)) for i, case in enumerate(SMALL)]
    + [
        pytest.param(name, config, marks=[pytest.mark.slow] * (name != "resnet18" or config != "W4A4 per channel"))
        for name, configs in OF_FULL_SIZE.items()
        for config in configs
    ],
)
def test_forward_and_backward_equal_the_oracle_s(name, config, request):
    if name in TORCHVISION:
        request.getfixturevalue("torchvision")
    original, x, _ = build(name)
    quantized = quantize_model(original, CONFIGS[config], calibration=x).double()
    x = x.double()
    scales = {f"{n}.{key}" for n, q in _quantizers(quantized) for key, _ in q.named_parameters()}
    with torch.no_grad():
        for _, q in _quantizers(quantized):  # Away from where they start, so that values lie beyond both bounds.
            factor = torch.exp(0.3 * torch.randn_like(q.raw_scale))
            q.raw_scale.copy_((q.scale * factor).log() if q.scale_domain == "log" else q.scale * factor)
        for module in quantized.modules():  # And one weight of each layer on its lower bound, a power of two, exactly.
            if isinstance(module, QuantizedModule) and module.weight_quantizer is not None:
                q = module.weight_quantizer
                module.weight.view(-1)[0] = -(2 ** (q.bits - 1)) * q.scale[0]
    missing, _ = original.double().load_state_dict(quantized.state_dict(), strict=False)
    assert not missing
    # Evaluation first, before training moves running statistics. vit_b_16 has nothing that the two differ in.
    for training in (True,) if name == "vit_b_16" else (False, True):
        quantized.train(training).zero_grad()
        y = quantized(x)
        cotangent = torch.randn_like(y)
        y.backward(cotangent)
        got = {key: p.grad for key, p in quantized.named_parameters()}
        expected, want = network_oracle.recompute(original, quantized, x, cotangent)
        assert scales <= want.keys()
        assert all(bool(g.isfinite().all()) for g in want.values())
        if training:  # In evaluation, by norms that were never trained, a signal can vanish on its way.
            assert all(bool(want[key].any()) for key in scales)
        # In float64 both have the same codes, and differ by the order of their sums, in the last of 16 digits. Sums
        # that cancel, as that of a bias before BatchNorm does to nothing, lose digits: hence relative to the largest.
        largest = max(float(g.abs().max()) for g in want.values())
        torch.testing.assert_close(y.detach(), expected, rtol=1e-9, atol=1e-12 * float(expected.abs().max()))
        assert_close((y.detach(), got), (y.detach(), want), rtol=1e-9, atol=1e-12 * largest)


def _quantizers(model):
    return [(name, module) for name, module in model.named_modules() if isinstance(module, LSQQuantizer)]


@every_network
def test_without_its_quantizers_it_is_the_float_network(original, quantized, x):
    with torch.no_grad():
        expected = norms_by_batch(original)(x)
        norms_by_batch(quantized)
        with quantization_disabled(quantized):
            # Attention projects query, key and value one by one, and sums in another order.
            torch.testing.assert_close(quantized(x), expected, rtol=1e-4, atol=1e-5)
        assert (quantized(x) - expected).abs().mean() > 1e-3 * expected.abs().mean()


@pytest.mark.parametrize(
    ("name", "layers", "in_float"),
    [
        ("resnet18", 21, []),
        ("mobilenet_v3_small", 54, []),
        # Patches, head, and in each of 12 blocks: attention, its out-projection, two linear. What is in floating point
        # is no layer: the class token, and the embedding of positions.
        pytest.param("vit_b_16", 50, ["the model (VisionTransformer)", "encoder (Encoder)"], marks=pytest.mark.slow),
    ],
    scope="module",
)
def test_every_layer_of_torchvision_s_networks_is_quantized(built, layers, in_float):
    summary = quantization_summary(built[1])
    assert len(summary) == layers
    assert summary.left_in_float == in_float
    assert all(r.weight_bits and r.activation_bits and r.activation_scale for r in summary)


# -- what it keeps --------------------------------------------------------------------------------------------------


def by_name(model):
    """Every parameter, buffer and module under each of its names."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }, dict(model.named_modules(remove_duplicate=False))


def first_names(objects):
    """For each name the first one of the same object."""
    first = {}
    return {name: first.setdefault(id(value), name) for name, value in objects.items()}


@every_network
def test_in_place_everything_is_the_same_object_under_the_same_name(name, original, x):
    tensors, modules = by_name(original)
    keys = list(original.state_dict())
    shared = first_names(modules)
    quantized = quantize_model(original, PLAIN, calibration=x, inplace=True)
    assert (quantized is original) == (name != "single layer")
    new_tensors, new_modules = by_name(quantized)
    assert all(new_tensors[key] is value for key, value in tensors.items())
    swapped = {key for key, module in modules.items() if new_modules[key] is not module}
    assert len({shared[key] for key in swapped}) == len(quantization_summary(quantized)) > 0
    for key in swapped:  # A layer of the same kind; out of attention's own kind of Linear, a plain one.
        kind = nn.Linear if type(modules[key]) is NonDynamicallyQuantizableLinear else type(modules[key])
        assert isinstance(new_modules[key], kind)
    new_shared = first_names(new_modules)
    assert {key: new_shared[key] for key in modules} == shared
    assert [key for key in quantized.state_dict() if key in set(keys)] == keys
    added = {key.rpartition(".")[0] for key in quantized.state_dict().keys() - set(keys)}
    assert added == {key for key, module in new_modules.items() if isinstance(module, LSQQuantizer)}


def snapshot(model):
    """All that a network consists of: objects by identity, tensors by their bits too."""
    parts = []
    for name, module in model.named_modules(remove_duplicate=False):
        registries = {key: dict(value) for key, value in vars(module).items() if isinstance(value, dict)}
        parts.append((name, module, type(module), dict(vars(module)), registries))
    return parts, {key: value.clone() for key, value in by_name(model)[0].items()}


def same_items(a, b):
    return list(a) == list(b) and all(a[key] is b[key] for key in a)


def assert_unchanged(model, before):
    parts, tensors = snapshot(model)
    assert len(parts) == len(before[0])
    for now, then in zip(parts, before[0], strict=True):
        assert now[0] == then[0]
        assert now[1] is then[1]
        assert now[2] is then[2]
        assert same_items(now[3], then[3]), now[0]
        assert now[4].keys() == then[4].keys()
        assert all(same_items(now[4][key], then[4][key]) for key in now[4]), now[0]
    assert tensors.keys() == before[1].keys()
    assert all(torch.equal(tensors[key], before[1][key]) for key in tensors)


@every_network
def test_a_copy_leaves_the_original_as_it_was_to_the_bit(original, x):
    calls = []
    for index, module in enumerate(original.modules()):
        module.train(index % 2 == 0)
    next(original.children(), original).register_forward_hook(lambda *_: calls.append("hook"))
    before = snapshot(original)
    quantized = quantize_model(original, PLAIN, calibration=x)
    assert_unchanged(original, before)
    assert calls  # by calibration: hooks go along
    tensors, others = by_name(original)[0], by_name(quantized)[0]
    assert not {t.data_ptr() for t in tensors.values()} & {t.data_ptr() for t in others.values()}
    assert all(torch.equal(others[key], value) for key, value in tensors.items())
    modules, training = by_name(original)[1], {key: m.training for key, m in by_name(quantized)[1].items()}
    assert {key: module.training for key, module in modules.items()} == {key: training[key] for key in modules}


@every_network
def test_a_float_state_dict_loads_with_only_scale_keys_missing(original, quantized):
    with torch.no_grad():
        for p in quantized.parameters():
            p.add_(1)
    missing, unexpected = quantized.load_state_dict(original.state_dict(), strict=False)
    assert not unexpected
    names = {name for name, module in by_name(quantized)[1].items() if isinstance(module, LSQQuantizer)}
    assert {key.rpartition(".")[0] for key in missing} == names
    assert all("scale" in key.rpartition(".")[2] for key in missing)
    assert all(torch.equal(p, quantized.get_parameter(key)) for key, p in original.named_parameters())


def same_bits(a, b, x):
    """Whether two networks compute the same, in evaluation and in training."""
    with torch.no_grad():
        first = torch.equal(a.eval()(x), b.eval()(x))
        return first and torch.equal(a.train()(x), b.train()(x))


@every_network
def test_its_state_as_a_file_computes_the_same_bits_in_another(original, quantized, x):
    other = quantize_model(original, PLAIN, inplace=True)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.1)
    file = io.BytesIO()
    torch.save(quantized.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert same_bits(other, quantized, x)


@every_network
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_compute_the_same_bits_and_share_nothing(copied, quantized, x):
    other = copied(quantized)
    assert same_bits(other, quantized, x)
    tensors, modules = by_name(quantized)
    others, other_modules = by_name(other)
    assert first_names(tensors) == first_names(others)
    assert first_names(modules) == first_names(other_modules)
    assert not {t.data_ptr() for t in tensors.values()} & {t.data_ptr() for t in others.values()}


# -- what it goes through -------------------------------------------------------------------------------------------


def compile_counted(model, backend):
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend(backend)
    return torch.compile(model, backend=graphs, fullgraph=True), graphs


# torch.compile instantiates autograd functions while it traces them, which torch itself warns of.
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.*should not be instantiated:DeprecationWarning")
@each_kind_of_network
def test_compiles_to_one_graph_in_training_and_evaluation(name, original, quantized, x):
    # Networks of full size have no kind of layer that the small ones lack, and AOTAutograd would take them a minute.
    compiled, graphs = compile_counted(quantized, "eager" if name in TORCHVISION else "aot_eager")
    reference = copy.deepcopy(quantized)
    for _, quantizer in _quantizers(reference):
        quantizer.save_output_for_backward = (
            False  # Eager mode then takes gradients of scales as the compiled graph does,
        )
    wanted = x.clone().requires_grad_(x.is_floating_point())  # and that of the first one, too.
    got = gradients(quantized.train(), lambda: compiled(x))
    # The same kernels in the same order: to the bit.
    assert_close(got, gradients(reference.train(), lambda: reference(wanted)), rtol=0, atol=0)
    assert torch.equal(compiled.eval()(x), reference.eval()(x))
    for training in (True, False):
        compiled.train(training)(x)
    # BatchNorm, dropout and attention compile again for evaluation by themselves; the quantizers add no reason to.
    plain, expected = compile_counted(original, "eager")
    for training in (True, False):
        plain.train(training)(x)
    assert graphs.frame_count == expected.frame_count <= 2


@each_kind_of_network
def test_exports_with_a_free_batch_size(quantized, x):
    quantized.eval()
    exported = torch.export.export(quantized, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()
    for batch in (x, x[:1], torch.cat([x, x.flip(0), x])):
        y = quantized(batch)
        assert bool(y.any())
        assert torch.equal(exported(batch), y)


@every_network
def test_gradient_checkpointing_changes_nothing(quantized, x):
    for module in quantized.train().modules():
        if isinstance(module, _BatchNorm):
            module.eval()  # recomputing would count a batch twice, with or without quantizers
    plain = gradients(quantized, lambda: quantized(x))
    again = gradients(quantized, lambda: checkpoint(quantized, x, use_reentrant=False))
    assert_close(plain, again, rtol=0, atol=0)


@every_network
def test_bfloat16_autocast_trains_near_float32(name, original, x):
    # Autocast leaves 8 bits of precision in every product, and codes flip. In the networks of full size each flip goes
    # through many layers that were never trained to bear it: there with codes as fine as bfloat16, and still less near.
    bits, tolerance = (8, 0.3) if name in TORCHVISION else (4, 0.2)
    quantized = quantize_model(original, QuantConfig(bits, bits), calibration=x, inplace=True).train()
    full, _ = gradients(quantized, lambda: quantized(x))
    quantized.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        low = quantized(x)
    low.float().square().mean().backward()
    assert all(bool(p.grad.isfinite().all()) for p in quantized.parameters())
    assert (low.float() - full).abs().mean() < tolerance * full.abs().mean()


@pytest.mark.parametrize("name", IMAGES, scope="module")
def test_channels_last_changes_nothing(name, original, x):
    # In float64, so that sums in another order leave all codes as they are. Sums of codes are often equal, though, and
    # which one is the largest must not be for the last bit to decide: resnet18 pools the maxima of its first layer.
    config = replace(PLAIN, exclude=["conv1"] if name == "resnet18" else [])
    quantized = quantize_model(original, config, calibration=x, inplace=True).double().train()
    # Nor on which side of the kink of ReLU an average is, where BatchNorm has no bias and puts it there.
    for module in quantized.modules():
        if isinstance(module, _BatchNorm):
            nn.init.normal_(module.bias, std=0.1)
    plain, last = x.double(), x.double().to(memory_format=torch.channels_last)
    want = gradients(quantized, lambda: quantized(plain))
    quantized.to(memory_format=torch.channels_last)
    got = gradients(quantized, lambda: quantized(last))
    largest = max(float(g.abs().max()) for g in want[1].values())
    torch.testing.assert_close(got[0], want[0], rtol=1e-9, atol=1e-12 * float(want[0].abs().max()))
    assert_close(got, (got[0], want[1]), rtol=1e-9, atol=1e-12 * largest)


@pytest.mark.cover("values")
@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in COMPOSED)) for n in NETWORKS])
@pytest.mark.parametrize("domain", ["log", "linear"])
def test_scales_stay_positive_and_finite_at_ten_times_the_learning_rate(name, domain):
    model, x, y = build(name)
    model = quantize_model(model, QuantConfig(4, 4, scale_domain=domain), calibration=x).train()
    for optimizer in (torch.optim.Adam(model.parameters(), lr=0.02), torch.optim.SGD(model.parameters(), lr=0.5)):
        trainer = GAQATOptimizer(optimizer, model)

        def closure(trainer=trainer):
            trainer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
            return loss

        for _ in range(25):
            trainer.step(closure)
            scales = torch.cat([m.scale.detach() for m in model.modules() if hasattr(m, "raw_scale")])
            assert bool((scales > 0).all())
            assert bool(scales.isfinite().all())

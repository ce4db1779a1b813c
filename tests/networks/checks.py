"""What is checked of each network, a function a check. Each returns figures, and raises if something is wrong."""

from __future__ import annotations

import copy
import pickle
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gaqat_optim import (
    GAQATOptimizer,
    QuantConfig,
    convert,
    export_onnx,
    param_groups,
    quantization_disabled,
    quantization_summary,
    quantize_model,
    rounded_biases,
)
from gaqat_optim.quant.inputs import tensors_in
from networks.counters import activation_products, norms_left
from networks.outcomes import WrongResult, advised_exclude, described, told
from networks.parity import compare_layers
from networks.registry import Network

CONFIG = QuantConfig(4, 4)
LARGE = 5_000_000  # parameters
ATTENTION_ERROR = 1e-5  # of float32 sums in another order, relative to the largest output
PRODUCTS = {"QLinearConv", "QLinearMatMul", "QGemm", "ConvInteger", "MatMulInteger", "MatMulIntegerToFloat"}


@dataclass
class Subject:
    """One network on its way through the checks, each of which may use what those before it made."""

    network: Network
    record: dict[str, Any]
    original: nn.Module = field(init=False)
    sample: Any = field(init=False)
    config: QuantConfig = CONFIG
    quantized: nn.Module | None = None
    deployed: nn.Module | None = None

    def run(self, model: nn.Module) -> list[Tensor]:
        """The floating-point outputs for the sample."""
        output = model(**self.sample) if isinstance(self.sample, Mapping) else model(self.sample)
        return [value for value in tensors_in(output) if value.is_floating_point()]

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> list[Tensor]:
        return self.run(model.eval())


def build(subject: Subject) -> dict[str, Any]:
    """Random weights, and running statistics of the sample: with initial ones, values vanish from layer to layer."""
    torch.manual_seed(0)
    subject.original, subject.sample = subject.network.build(), subject.network.sample()
    norms = [m for m in subject.original.modules() if isinstance(m, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = None
    with torch.no_grad():
        subject.run(subject.original.train())
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    subject.original.eval()
    parameters = sum(p.numel() for p in subject.original.parameters())
    if parameters > LARGE:  # without the search for the best scales, which takes the most time of all there
        subject.config = replace(subject.config, init="lsq")
    return {"parameters": parameters}


def quantize(subject: Subject) -> dict[str, Any]:
    """`quantize_model` with the sample as calibration. What it refuses is left out as its error says, once."""
    refusals: list[str] = []
    while True:
        try:
            subject.quantized = quantize_model(subject.original, subject.config, calibration=[subject.sample])
            break
        except ValueError as error:
            exclude = advised_exclude(str(error))
            if exclude is None or exclude == subject.config.exclude:
                raise
            refusals.append(str(error))
            subject.config = replace(subject.config, exclude=exclude)
    names = [
        type(module).__name__
        for name, module in subject.original.named_modules()
        if any(fnmatchcase(name, pattern) for pattern in subject.config.exclude)
    ]
    return {"refusals": refusals, "left_out": [f"{names.count(kind)} {kind}" for kind in dict.fromkeys(names)]}


def shares(subject: Subject) -> dict[str, Any]:
    """How much is quantized."""
    summary = quantization_summary(subject.quantized, subject.sample)
    total = sum(summary.macs.values())
    products = activation_products(subject.quantized, lambda: subject.evaluate(subject.quantized))
    quantized = summary.mac_share * total
    if summary.never_called:
        raise WrongResult(f"0 MACs in {', '.join(summary.never_called)}")
    return {
        "weight_share": summary.weight_share,
        "mac_share": summary.mac_share,
        "layer_mac_share": quantized / max(total - products / 2, 1),  # of two entries
        "float": summary.left_in_float[:20],
    }


def float_network(subject: Subject) -> dict[str, Any]:
    """Without its quantizers it is the float network, to the bit.

    But for nn.MultiheadAttention, which torch computes in one kernel where it has no quantizers: in another order.
    """
    expected = subject.evaluate(subject.original)
    with quantization_disabled(subject.quantized):
        found = subject.evaluate(subject.quantized)
    difference = _difference(expected, found)
    has_attention = any(isinstance(module, nn.MultiheadAttention) for module in subject.original.modules())
    if difference > (ATTENTION_ERROR if has_attention else 0.0):
        raise WrongResult(f"without its quantizers it differs from the float network by {difference:.2g}")
    return {"float_difference": difference}


def training(subject: Subject) -> dict[str, Any]:
    """Three steps, then a second pass that is aborted."""
    model = subject.quantized.train()
    optimizer = GAQATOptimizer(torch.optim.Adam(param_groups(model), lr=1e-4), model)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = sum(value.float().square().mean() for value in subject.run(model))
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(3)]
    values = {key: value for key, value in model.state_dict().items() if value.is_floating_point()}
    if bad := [key for key, value in values.items() if not value.isfinite().all()]:
        raise WrongResult(f"not finite after three steps: {', '.join(bad[:5])}")
    closure()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    try:
        with optimizer.perturbed():
            closure()
            raise InterruptedError
    except InterruptedError:
        pass
    if changed := [key for key, value in model.state_dict().items() if not _same(value, before[key])]:
        raise WrongResult(f"not restored: {', '.join(changed[:5])}")
    return {"losses": losses}


def copies(subject: Subject) -> dict[str, Any]:
    """A state dict in a second network, a deepcopy and a pickle compute the same bits."""
    model = subject.quantized
    expected = subject.evaluate(model)
    # Its own configuration, in which calibration has put the bits of the first and last layers. Scales are loaded.
    second = quantize_model(subject.original, replace(model.quant_config, init="lsq"))
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.mul_(0.5)
    second.load_state_dict(model.state_dict())
    others = {"state dict": second, "deepcopy": copy.deepcopy(model)}
    if is_pickled := _can_be_pickled(subject.original):
        others["pickle"] = pickle.loads(pickle.dumps(model))
    for name, other in others.items():
        if difference := _difference(expected, subject.evaluate(other)):
            raise WrongResult(f"by {name}, the network differs by {difference:.2g}")
    return {"pickled": is_pickled}


def conversion(subject: Subject) -> dict[str, Any]:
    """`convert`, and each deployed layer on the input that training gave its layer."""
    subject.deployed = convert(subject.quantized)
    left = norms_left(subject.deployed, lambda: subject.evaluate(subject.deployed))
    with rounded_biases(subject.quantized):
        worst, layer = compare_layers(subject.quantized, subject.deployed, subject.evaluate)
    return {**left, "conversion_error": worst, "conversion_layer": layer}


def export(subject: Subject) -> dict[str, Any]:
    """ONNX, with output quantizers: the kernels, and how onnxruntime compares with `convert`."""
    if not subject.network.exported:
        return {}
    subject.record["figures"]["exported"] = True  # even if it fails
    config = replace(subject.config, output_bits=8, init="lsq")
    model = quantize_model(subject.original, config, calibration=[subject.sample])
    with tempfile.TemporaryDirectory() as folder:
        report = export_onnx(model, subject.sample, Path(folder) / "network.onnx")
    integer = sum(count for kind, count in report.integer_kernels.items() if kind in PRODUCTS)
    floating = [f"{o.name}: {o.reason}" for o in report.float_operators if o.has_integers]
    return {
        "integer_share": integer / max(integer + len(floating), 1),
        "float_products": floating[:20],
        "code_flip_rate": report.code_flip_rate,
        "top1_agreement": report.top1_agreement,
        "compression": report.compression,
    }


CHECKS: dict[str, Callable[[Subject], dict[str, Any]]] = {
    check.__name__: check for check in (build, quantize, shares, float_network, training, copies, conversion, export)
}
_NEEDED = {"build", "quantize"}  # nothing goes on without them


def run_checks(network: Network, names: list[str], progress: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """The record of a network: figures, errors, warnings and seconds; ``progress`` gets it after every check."""
    record = {"name": network.name, "family": network.family, "figures": {}, "errors": [], "told": {}, "seconds": {}}
    subject = Subject(network, record)
    for name in names:
        begin = time.process_time()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                record["figures"] |= CHECKS[name](subject)
            except Exception as error:
                record["errors"].append(described(error, name, getattr(subject, "original", None)))
        if said := told(caught):
            record["told"][name] = sorted(set(said))
        record["seconds"][name] = round(time.process_time() - begin, 2)
        progress(record)
        if name in _NEEDED and record["errors"]:
            break
    return record


def _can_be_pickled(model: nn.Module) -> bool:
    """Not with hooks that were defined in a function, as segformer's, and not with parametrizations of torch."""
    try:
        return bool(pickle.dumps(model))
    except (AttributeError, RuntimeError, pickle.PicklingError):
        return False


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a, b) or (
        a.shape == b.shape and torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())
    )


def _difference(expected: list[Tensor], found: list[Tensor]) -> float:
    """The largest difference, relative to the largest value; 0 if they agree to the bit."""
    if len(expected) != len(found):
        return float("inf")
    pairs = [(a, b) for a, b in zip(expected, found, strict=True) if not _same(a, b)]
    return max((((a - b).abs().max() / a.abs().max()).item() for a, b in pairs), default=0.0)

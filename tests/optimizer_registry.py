"""What the generic tests of the optimizer run over, one line an entry, and the network that they train.

To have a perturbation's setting, a policy, a base or a protocol tested against all others, add a line here. A new class
of perturbation or policy also needs its formula in oracle/optimizer_twin.py.
"""

import inspect
import math
from collections.abc import Callable
from functools import partial
from itertools import combinations, cycle, product
from typing import NamedTuple

import torch
from torch import nn

import devices
from devices import DEVICE
from gaqat_optim import (
    ASAM,
    GSAM,
    SAGM,
    SAM,
    AlternateFreeze,
    AlwaysFreeze,
    ConflictFreeze,
    DisorderFreeze,
    FreezeOnce,
    GAQATOptimizer,
    NeverFreeze,
    OppositionFreeze,
    RandomFreeze,
)
from oracle.optimizer_twin import EXTRA, SHAPES, Twin, is_scale

# -- perturbations: the setting, and the "rho" of a second parameter group (None: one group for all) --------------

PERTURBATIONS = {
    "sam": (SAM(0.3), None),
    "sam-rho0": (SAM(0.3), 0.0),
    "sagm": (SAGM(0.4, 0.05), None),
    "sagm-downhill": (SAGM(0.05, 0.3), None),
    "sagm-radius": (SAGM(0.4, 0.05), 0.9),
    "asam": (ASAM(0.5), None),
    "asam-radius": (ASAM(0.5, eta=0.2), 0.1),
    "gsam": (GSAM(0.3), None),
    "gsam-rho0": (GSAM(0.3, alpha=0.9), 0.0),
}

# -- policies ---------------------------------------------------------------------------------------------------


POLICIES = {
    "never": NeverFreeze(),
    "never-3": NeverFreeze(3),
    "always": AlwaysFreeze(),
    "always-smooth": AlwaysFreeze(4, freeze="smooth"),
    "always-both": AlwaysFreeze(freeze="both"),
    "below": DisorderFreeze(3, 0.5),
    "above": DisorderFreeze(3, 0.4, when="above"),
    "task": DisorderFreeze(4, 0.6, freeze="task"),
    "smooth": DisorderFreeze(2, 0.7, freeze="smooth", measure="smooth"),
    "both": DisorderFreeze(3, 0.5, freeze="both"),
    "quantile": DisorderFreeze(3, quantile=0.5),
    "quantile-above": DisorderFreeze(5, quantile=0.3, when="above", measure="smooth", freeze="both"),
    "once": FreezeOnce(3, 0.3),
    "once-quantile": FreezeOnce(4, quantile=0.25, freeze="both"),
    "random": RandomFreeze(2),
    "random-both": RandomFreeze(3, 0.75, seed=5, freeze="both"),
    "conflict": ConflictFreeze(4, 0.3),
    "conflict-smooth": ConflictFreeze(3, 0.2, freeze="smooth"),
    "opposition": OppositionFreeze(4, 0.9),
    "one step": DisorderFreeze(1, 0.5),
    "alternate": AlternateFreeze(2),
    "alternate-both": AlternateFreeze(3, freeze="both"),
}

# -- bases: the class and its settings. "capturable" is not here: torch refuses it on a CPU in every optimizer ------

O = torch.optim  # noqa: E741 (one line an entry)
LR = torch.tensor(0.05, dtype=torch.float64)
BASES = {
    "sgd": (O.SGD, {"lr": 0.1, "foreach": False}),
    "sgd-momentum": (O.SGD, {"lr": 0.05, "momentum": 0.9, "foreach": True}),
    "sgd-nesterov": (O.SGD, {"lr": 0.05, "momentum": 0.8, "nesterov": True, "weight_decay": 0.02}),
    "sgd-fused": (O.SGD, {"lr": 0.05, "momentum": 0.9, "fused": True}),
    "sgd-tensor-lr": (O.SGD, {"lr": LR, "momentum": 0.5, "foreach": True}),
    "adam": (O.Adam, {"lr": 0.03, "foreach": False}),
    "adam-foreach": (O.Adam, {"lr": 0.03, "foreach": True, "amsgrad": True}),
    "adam-fused": (O.Adam, {"lr": 0.03, "fused": True}),
    "adam-tensor-lr": (O.Adam, {"lr": LR, "foreach": False}),
    "adamw": (O.AdamW, {"lr": 0.03, "weight_decay": 0.1, "foreach": False}),
    "adamw-foreach": (O.AdamW, {"lr": 0.03, "weight_decay": 0.1, "foreach": True}),
    "adamw-fused": (O.AdamW, {"lr": LR, "weight_decay": 0.1, "fused": True}),
    "rmsprop": (O.RMSprop, {"lr": 0.01, "momentum": 0.5, "foreach": False}),
    "rmsprop-foreach": (O.RMSprop, {"lr": LR, "centered": True, "eps": 1e-2, "foreach": True}),
    "adagrad": (O.Adagrad, {"lr": 0.1, "foreach": True}),
    "adagrad-fused": (O.Adagrad, {"lr": 0.1, "fused": True}),
    "nadam": (O.NAdam, {"lr": 0.03, "foreach": True}),
    "radam": (O.RAdam, {"lr": 0.03, "foreach": True}),
    "adafactor": (O.Adafactor, {"lr": 0.05, "weight_decay": 0.05, "foreach": True}),
    "adafactor-loop": (O.Adafactor, {"lr": 0.05, "foreach": False}),
    **({"muon": (O.Muon, {"lr": 0.05, "weight_decay": 0.1})} if hasattr(O, "Muon") else {}),  # torch 2.9
}


def make_base(base, groups):
    kind, settings = BASES[base]
    settings = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in settings.items()}
    return devices.build(lambda: kind(groups, **settings))


def make_slow_base(base, groups):
    """The same on one tensor after the other, whatever the entry asks for."""
    kind, settings = BASES[base]
    settings = {k: float(v) if isinstance(v, torch.Tensor) else v for k, v in settings.items() if k != "fused"}
    if "foreach" in inspect.signature(kind).parameters:
        settings["foreach"] = False
    return kind(groups, **settings)


# -- the network ------------------------------------------------------------------------------------------------

GENERATOR = torch.Generator().manual_seed(7)
START = {
    n: torch.rand(s, generator=GENERATOR, dtype=torch.float64).add(0.3).flatten().tolist() for n, s in SHAPES.items()
}
START["weight"][1] *= -1
START["head"][1] *= -1
START["extra.weight"][0] *= -1
# Five batches that want different things, so that signs flip, by margins far above rounding.
XS = torch.randn(5, 8, 3, generator=GENERATOR, dtype=torch.float64)
YS = 1.5 * torch.randn(5, 8, generator=GENERATOR, dtype=torch.float64)
BATCHES = list(zip(XS.to(DEVICE), YS.to(DEVICE), strict=True))
FLOAT_BATCHES = list(zip(XS.tolist(), YS.tolist(), strict=True))


class Part(nn.Module):
    """Some of the network's parameters."""

    def __init__(self, **parameters):
        super().__init__()
        for name, values in parameters.items():
            self.register_parameter(name, values)


def parameter(name):
    return nn.Parameter(torch.tensor(START[name], dtype=torch.float64, device=DEVICE).view(SHAPES[name]))


class Net(nn.Module):
    """The problem of oracle/optimizer_twin.py, in torch."""

    def __init__(self, extra=True):
        super().__init__()
        self.weight, self.bias, self.head = parameter("weight"), parameter("bias"), parameter("head")
        self.norm = nn.BatchNorm1d(3, affine=False, dtype=torch.float64, device=DEVICE)
        # Its place is here even if it comes later: new scales are then the first.
        self.register_module("extra", None)
        if extra:
            self.add_extra()
        self.gain, self.out = Part(scale=parameter("gain.scale")), Part(scale=parameter("out.scale"))

    def add_extra(self):
        self.extra = Part(weight=parameter("extra.weight"), scale=parameter("extra.scale"))

    def forward(self, x, extra=True):
        x = self.norm(x)
        units = torch.tanh(x @ self.weight.T * self.gain.scale.T + self.bias.T)
        y = units @ self.head.T * self.out.scale
        if extra and self.extra is not None:
            y = y + torch.tanh(x @ self.extra.weight.T) * self.extra.scale
        return y.flatten()


def groups_of(names, radius):
    """The parameter groups by name: one, or with ``radius`` a second one of its own "rho", a scale in it."""
    if radius is None:
        return [{"names": list(names)}]
    second = [name for name in names if name in ("bias", "head", "gain.scale")]
    return [{"names": [n for n in names if n not in second]}, {"names": second, "rho": radius}]


def tensor_groups(model, groups):
    parameters = dict(model.named_parameters())
    return [
        {"params": [parameters[n] for n in g["names"]], **{k: v for k, v in g.items() if k != "names"}} for g in groups
    ]


def build(perturbation, policy, base, interval=1, extra=True):
    """The network with its optimizer, and the twin."""
    model = Net(extra)
    setting, radius = PERTURBATIONS[perturbation]
    groups = groups_of([n for n in SHAPES if extra or n not in EXTRA], radius)
    optimizer = wrap(make_base(base, tensor_groups(model, groups)), model, setting, policy, interval)
    twin = Twin(START, groups, partial(make_slow_base, base), setting, POLICIES[policy], interval, DEVICE)
    return model, optimizer, twin


def wrap(base, model, perturbation, policy, interval=1):
    return GAQATOptimizer(
        base, model, perturbation=perturbation, freezing=POLICIES[policy], scales=is_scale, interval=interval
    )


# -- protocols: the ways to make a step -------------------------------------------------------------------------


def one_pass(model, batches, extra=True, scale=1.0):
    """Forward and backward, micro-batch by micro-batch."""
    total = 0.0
    for x, y in batches:
        loss = (model(x, extra) - y).square().mean() / len(batches)
        (loss * scale).backward()
        total += loss.item()
    return total


def closure_form(optimizer, first, second):
    passes = iter((first, second))

    def closure():
        optimizer.zero_grad()
        return next(passes)()

    optimizer.step(closure)


def explicit_form(optimizer, first, second, scale=1.0):
    optimizer.zero_grad()
    first(scale=scale)
    if optimizer.perturbs and second is not None:
        with optimizer.perturbed(grad_scale=scale):
            second(scale=scale)
    for p in (p for group in optimizer.param_groups for p in group["params"] if p.grad is not None):
        p.grad /= scale
    optimizer.step()


class Protocol(NamedTuple):
    """How a step is made.

    Attributes:
        form: calls the two passes and the optimizer.
        interval: of the second pass.
        micro: size of the micro-batches.
        uses: whether the first and the second pass use the extra unit, one pair for each step, in a cycle; ``None``
            for a second pass that the user leaves out.
    """

    form: Callable[..., None]
    interval: int = 1
    micro: int = 8
    uses: tuple[tuple[bool, bool | None], ...] = ((True, True),)


PROTOCOLS = {
    "closure": Protocol(closure_form),
    "explicit": Protocol(explicit_form),
    "accumulated": Protocol(explicit_form, micro=3),  # 3 + 3 + 2
    "fours": Protocol(explicit_form, micro=2),
    "scaled": Protocol(partial(explicit_form, scale=1024.0)),
    "scaled-tensor": Protocol(partial(explicit_form, scale=torch.tensor(1024.0))),
    "interval-closure": Protocol(closure_form, interval=3),
    "interval-explicit": Protocol(explicit_form, interval=3, micro=4),
    "own-interval": Protocol(explicit_form, uses=((True, True), (True, None), (True, None))),
    "one-sided": Protocol(closure_form, uses=((True, True), (True, False), (False, True))),
}


def split(batch, size):
    x, y = batch
    return [(x[i : i + size], y[i : i + size]) for i in range(0, len(x), size)]


def train_step(protocol, optimizer, model, number):
    protocol, batch = PROTOCOLS[protocol], split(BATCHES[number % 5], PROTOCOLS[protocol].micro)
    uses = protocol.uses[number % len(protocol.uses)]
    passes = [None if extra is None else partial(one_pass, model, batch, extra) for extra in uses]
    protocol.form(optimizer, *passes)


def twin_step(protocol, twin, number):
    protocol, batch = PROTOCOLS[protocol], split(FLOAT_BATCHES[number % 5], PROTOCOLS[protocol].micro)
    first, second = protocol.uses[number % len(protocol.uses)]
    task = twin.first(batch, first)
    twin.step(task, twin.second(task, batch, second) if twin.perturbs and second is not None else None)


# -- comparison -------------------------------------------------------------------------------------------------

# Both sides are float64 and differ in the order of sums: 1e-16 relative for each, some hundred of them a step, and a
# few dozen steps that amplify the difference little (measured: below 1e-12 in every case). A wrong term, count or mask
# shows at 1e-4 and more.
RTOL, ATOL = 1e-9, 1e-11


def assert_agree(optimizer, model, twin):
    """Parameters within the tolerance; counters, masks, running statistics and the turn of the interval as well."""
    named = {name: p.detach().flatten().tolist() for name, p in model.named_parameters()}
    assert_close(named, twin.theta, RTOL, ATOL)
    report = {r.name: [r.scale, r.disorder_task, r.disorder_smooth, r.conflict, r.opposition, r.frozen]
              for r in optimizer.scale_report()}  # fmt: skip
    want = twin.report()
    assert list(report) == list(want)
    # Ratios of counts below 1000, in float32: another count is another ratio, by more than 1e-6.
    assert_close(report, want, 1e-6, 1e-7)
    assert optimizer.perturbs == twin.perturbs
    assert (optimizer.steps, optimizer.perturbed_steps) == (twin.steps, twin.perturbed_steps)
    norm = {"mean": model.norm.running_mean.tolist(), "var": model.norm.running_var.tolist()}
    assert_close(norm, {"mean": twin.running_mean, "var": twin.running_var}, RTOL, ATOL)
    assert model.norm.num_batches_tracked.item() == twin.batches_seen
    assert model.norm.track_running_stats


def assert_close(got, want, rtol, atol):
    """Two dicts of lists of floats."""
    assert got.keys() == want.keys()
    for name, values in want.items():
        for a, b in zip(got[name], values, strict=True):
            if not (math.isclose(a, b, rel_tol=rtol, abs_tol=atol) or (math.isnan(a) and math.isnan(b))):
                raise AssertionError(f"{name}: {got[name]}, the twin has {values}")


# -- which cases ------------------------------------------------------------------------------------------------


def legal(perturbation, policy, protocol="closure"):
    no_task_part = isinstance(PERTURBATIONS[perturbation][0], SAM | ASAM)
    return not (no_task_part and POLICIES[policy].freeze == "task")  # refused at construction


def covering_cases():
    """Cases (perturbation, policy, base, protocol) such that any two entries that may meet do, in one case at least.

    Greedy and without chance, and so the same in every run: for each policy and base, and then for each pair that is
    left, the case in which most entries meet for the first time.
    """
    every = [case for case in product(PERTURBATIONS, POLICIES, BASES, PROTOCOLS) if legal(case[0], case[1], case[3])]
    grouped = {}
    for case in every:
        grouped.setdefault((case[1], case[2]), []).append(case)
    met, cases = set(), []
    for candidates in grouped.values():
        cases.append(max(candidates, key=lambda case: len(pairs(case) - met)))
        met |= pairs(cases[-1])
    for case in every:
        if not pairs(case) <= met:
            cases.append(case)
            met |= pairs(case)
    return cases


def cases_in_turn():
    """Each legal pair of perturbation and policy once, bases and protocols in turn."""
    every = [case for case in product(PERTURBATIONS, POLICIES) if legal(*case)]
    turns = zip(every, cycle(BASES), cycle(PROTOCOLS), strict=False)
    return [(*case, base, protocol) for case, base, protocol in turns]


def pairs(case):
    return set(combinations(enumerate(case), 2))

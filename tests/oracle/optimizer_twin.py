"""The whole step of GAQATOptimizer again, slowly: Python floats (float64), loops, and nothing of the package's code.

Written from the equations of the method. The network, its gradient, the perturbation, the combination, the counting of
signs, the judgement of each policy, masks and intervals are all here. Two things are torch's: the base optimizer, which
steps on float64 tensors one by one, and the random permutation that RandomFreeze documents.

From the package come only the settings: the dataclasses of perturbations and policies, for their fields. A new one
needs its formula in ``FORMULAS`` or its rule in ``JUDGES``.
"""

import math

import numpy as np
import torch

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
    NeverFreeze,
    OppositionFreeze,
    RandomFreeze,
)
from oracle.sign_counter import SignCounter

# -- the problem -----------------------------------------------------------------------------------------------

# All parameters are matrices, because Muon takes no others. The order is that of the network's named_parameters().
SHAPES = {
    "weight": (2, 3),
    "bias": (2, 1),
    "head": (1, 2),
    "extra.weight": (1, 3),
    "extra.scale": (1, 1),
    "gain.scale": (2, 1),
    "out.scale": (1, 1),
}
EXTRA = ("extra.weight", "extra.scale")


def is_scale(name, p=None):
    return name.endswith("scale")


def normalized(xs):
    """A batch as BatchNorm makes it, with the mean and the two variances (biased, unbiased) of each feature."""
    n = len(xs)
    columns = list(zip(*xs, strict=True))
    means = [sum(c) / n for c in columns]
    squares = [sum((x - m) ** 2 for x in c) for c, m in zip(columns, means, strict=True)]
    rows = [[(x - m) / math.sqrt(s / n + 1e-5) for x, m, s in zip(row, means, squares, strict=True)] for row in xs]
    return rows, means, [s / (n - 1) for s in squares]


def gradient(theta, xs, ys):
    """Of the mean over samples of (out * sum_h head_h tanh(gain_h w_h x + b_h) + extra_scale * tanh(w_e x) - y)^2.

    ``theta`` and the gradient are dicts of flat lists. Without the extra unit in ``theta``, there is none.
    """
    total = {name: [0.0] * len(values) for name, values in theta.items()}
    (out,) = theta["out.scale"]
    for x, y in zip(xs, ys, strict=True):
        dots, units = [], []
        for h in range(2):
            dots.append(sum(theta["weight"][3 * h + i] * x[i] for i in range(3)))
            units.append(math.tanh(theta["gain.scale"][h] * dots[h] + theta["bias"][h]))
        hidden = sum(theta["head"][h] * units[h] for h in range(2))
        prediction = out * hidden
        if "extra.scale" in theta:
            extra = math.tanh(sum(theta["extra.weight"][i] * x[i] for i in range(3)))
            prediction += theta["extra.scale"][0] * extra
        r = 2 * (prediction - y) / len(xs)
        total["out.scale"][0] += r * hidden
        for h in range(2):
            total["head"][h] += r * out * units[h]
            inner = r * out * theta["head"][h] * (1 - units[h] ** 2)
            total["bias"][h] += inner
            total["gain.scale"][h] += inner * dots[h]
            for i in range(3):
                total["weight"][3 * h + i] += inner * theta["gain.scale"][h] * x[i]
        if "extra.scale" in theta:
            total["extra.scale"][0] += r * extra
            for i in range(3):
                total["extra.weight"][i] += r * theta["extra.scale"][0] * (1 - extra**2) * x[i]
    return total


# -- perturbations: what is added to the weights w by gradients g with radii, and the combined gradient ------------


def norm(values):
    return math.sqrt(sum(v * v for v in values))


def sam_direction(settings, w, g, radii, names):
    size = norm(g) + 1e-12
    return [rho / size * x for x, rho in zip(g, radii, strict=True)]


def sagm_direction(settings, w, g, radii, names):
    size = norm(g) + 1e-12
    return [(rho / size - settings.alpha) * x for x, rho in zip(g, radii, strict=True)]


def asam_direction(settings, w, g, radii, names):
    t = [abs(v) + settings.eta if "weight" in name.split(".")[-1] else 1 for v, name in zip(w, names, strict=True)]
    size = norm([a * x for a, x in zip(t, g, strict=True)]) + 1e-12
    return [rho / size * a * a * x for a, x, rho in zip(t, g, radii, strict=True)]


def smooth_alone(settings, task, smooth):
    return smooth


def mean(settings, task, smooth):
    return [(t + s) / 2 for t, s in zip(task, smooth, strict=True)]


def gap_closed(settings, task, smooth):
    squared = sum(s * s for s in smooth)
    along = sum(t * s for t, s in zip(task, smooth, strict=True)) / squared if squared else 0.0
    return [s - settings.alpha * (t - along * s) for t, s in zip(task, smooth, strict=True)]


# Each with: direction, combination, whether g_task is part of the step, whether scales are perturbed.
FORMULAS = {
    SAM: (sam_direction, smooth_alone, False, True),
    SAGM: (sagm_direction, mean, True, True),
    ASAM: (asam_direction, smooth_alone, False, False),
    GSAM: (sam_direction, gap_closed, True, True),
}


# -- policies: which elements are frozen next -------------------------------------------------------------------


def never(policy, counters, frozen, windows):
    return [False] * len(frozen)


def always(policy, counters, frozen, windows):
    return [True] * len(frozen)


def disordered(policy, counters, frozen, windows):
    values = [c.disorder(policy.measure) for c in counters]
    if policy.quantile is None:
        return [v < policy.threshold if policy.when == "below" else v > policy.threshold for v in values]
    seen = [i for i, v in enumerate(values) if not math.isnan(v)]
    seen.sort(key=lambda i: values[i] if policy.when == "below" else -values[i])  # ties: the first element first
    chosen = seen[: math.ceil(policy.quantile * len(seen))]
    return [i in chosen for i in range(len(values))]


def once(policy, counters, frozen, windows):
    return [a or b for a, b in zip(frozen, disordered(policy, counters, frozen, windows), strict=True)]


def drawn(policy, counters, frozen, windows):
    (mixed,) = np.random.SeedSequence([policy.seed, windows]).generate_state(1)
    permutation = torch.randperm(len(frozen), generator=torch.Generator().manual_seed(int(mixed))).tolist()
    return [position < round(policy.fraction * len(frozen)) for position in permutation]


def conflicting(policy, counters, frozen, windows):
    return [c.conflict() > policy.threshold for c in counters]


def opposed(policy, counters, frozen, windows):
    return [c.disorder("task") < policy.threshold and c.opposition() == 1 for c in counters]


def alternating(policy, counters, frozen, windows):
    return [windows % 2 == 0] * len(frozen)


JUDGES = {
    NeverFreeze: never,
    AlwaysFreeze: always,
    DisorderFreeze: disordered,
    FreezeOnce: once,
    RandomFreeze: drawn,
    ConflictFreeze: conflicting,
    OppositionFreeze: opposed,
    AlternateFreeze: alternating,
}


def of(table, thing):
    """The entry for the class of ``thing``, or the nearest class that it comes from."""
    return next(table[kind] for kind in type(thing).__mro__ if kind in table)


# -- the step --------------------------------------------------------------------------------------------------


class Twin:
    """Parameters, base optimizer, counters and masks of a run.

    Args:
        start: the parameters to begin with, as a dict of flat lists.
        groups: parameter groups with ``"names"`` for ``"params"``.
        make_base: makes the base optimizer from groups of tensors.
        perturbation, policy, interval: the settings of the package.
        device: where the base optimizer steps; everything else is in Python.
    """

    def __init__(self, start, groups, make_base, perturbation, policy, interval=1, device="cpu"):
        self.tensors = {}
        self.counters, self.frozen, self.judged = {}, {}, {}
        self.policy, self.interval, self.device = policy, interval, device
        self.perturb_by(perturbation)
        self.steps = self.perturbed_steps = self.windows = 0
        self.running_mean, self.running_var, self.batches_seen = [0.0] * 3, [1.0] * 3, 0
        self.smallest = math.inf  # the smallest gradient of a scale, zeros apart: how far all signs were from changing
        self.base = make_base([self._taken_up(start, group) for group in groups])

    def _taken_up(self, values, group):
        for name in group["names"]:
            tensor = torch.tensor(values[name], dtype=torch.float64, device=self.device)
            self.tensors[name] = tensor.view(SHAPES[name])
            for i in range(len(values[name]) if is_scale(name) else 0):
                self.counters[name, i] = SignCounter()
                self.frozen[name, i] = self.policy.initially_frozen
        rest = {key: value for key, value in group.items() if key != "names"}
        return {"params": [self.tensors[name] for name in group["names"]], **rest}

    def perturb_by(self, perturbation):
        self.perturbation = perturbation
        self.direction, self.combination, self.has_task, self.scales_move = of(FORMULAS, perturbation)

    def freeze_by(self, policy):
        """Another policy judges the last window again or, before the first, begins as it begins."""
        self.policy = policy
        self.frozen = dict.fromkeys(self.frozen, policy.initially_frozen)
        if self.windows:
            elements = self._elements()
            shown = [Shown(self.judged.get(e, [math.nan] * 4)) for e in elements]
            mask = of(JUDGES, policy)(policy, shown, list(self.frozen.values()), self.windows - 1)
            self.frozen = dict(zip(elements, mask, strict=True))

    @property
    def target(self):
        return self.policy.freeze or ("task" if self.has_task else "both")

    def add(self, values, group):
        self.base.add_param_group(self._taken_up(values, group))

    @property
    def theta(self):
        return {name: self.tensors[name].flatten().tolist() for name in SHAPES if name in self.tensors}

    @property
    def perturbs(self):
        return self.steps % self.interval == 0

    def _elements(self):
        """All scale elements, in the order of the network's parameters."""
        order = list(SHAPES)
        return sorted(self.counters, key=lambda element: (order.index(element[0]), element[1]))

    def _gradient(self, theta, batches, extra):
        """The sum over micro-batches, each of whose losses is divided by their number."""
        theta = {name: values for name, values in theta.items() if extra or name not in EXTRA}
        total = {name: [0.0] * len(values) for name, values in theta.items()}
        for xs, ys in batches:
            for name, values in gradient(theta, normalized(xs)[0], ys).items():
                total[name] = [a + b / len(batches) for a, b in zip(total[name], values, strict=True)]
        return total

    def first(self, batches, extra=True):
        """g_task, and what BatchNorm remembers of its batches."""
        for xs, _ in batches:
            _, means, variances = normalized(xs)
            self.running_mean = [0.9 * a + 0.1 * b for a, b in zip(self.running_mean, means, strict=True)]
            self.running_var = [0.9 * a + 0.1 * b for a, b in zip(self.running_var, variances, strict=True)]
            self.batches_seen += 1
        return self._gradient(self.theta, batches, extra)

    def perturbed_parameters(self, task):
        """The parameters in the second pass."""
        theta = self.theta
        where, w, g, radii = [], [], [], []
        for group in self.base.param_groups:
            for name in (name for name in task if any(self.tensors[name] is p for p in group["params"])):
                if group.get("rho") == 0 or (is_scale(name) and not self.scales_move):
                    continue
                for i, x in enumerate(task[name]):
                    where.append((name, i))
                    w.append(theta[name][i])
                    g.append(x)
                    radii.append(group.get("rho", self.perturbation.rho))
        names = [name for name, _ in where]
        for (name, i), d in zip(where, self.direction(self.perturbation, w, g, radii, names), strict=True):
            theta[name][i] += d
        return theta

    def second(self, task, batches, extra=True):
        """g_smooth."""
        return self._gradient(self.perturbed_parameters(task), batches, extra)

    def _without_frozen(self, part, gradients):
        if self.target not in (part, "both"):
            return gradients
        return {
            name: [0.0 if self.frozen.get((name, i)) else x for i, x in enumerate(values)]
            for name, values in gradients.items()
        }

    def combined(self, task, smooth):
        """The gradient for the base; a parameter that only one pass used takes the part that it has."""
        task, smooth = self._without_frozen("task", task), self._without_frozen("smooth", smooth)
        both = [(name, i) for name in task if name in smooth for i in range(len(task[name]))]
        merged = self.combination(self.perturbation, [task[n][i] for n, i in both], [smooth[n][i] for n, i in both])
        result = {name: list(values) for name, values in {**task, **smooth}.items()}
        for (name, i), x in zip(both, merged, strict=True):
            result[name][i] = x
        return result

    def step(self, task, smooth=None, closure=False):
        """The base's step; counting, and judging at the end of a window, if there was a second pass.

        A step at learning rates of 0, made by hand without a second pass, is what torch's distributed checkpoints do
        to have a state to fill. It takes no turn of the interval.
        """
        if smooth is not None:
            gradients = self.combined(task, smooth)
        else:
            # Without a second pass g_task is the whole step. One that is made by hand has no frozen part.
            gradients = self._without_frozen("task", task) if self.interval > 1 else task
        for name, tensor in self.tensors.items():
            tensor.grad = None
            if name in gradients:
                tensor.grad = tensor.new_tensor(gradients[name]).view(SHAPES[name])
        before = self.theta
        self.base.step()
        for (name, i), frozen in self.frozen.items():
            if frozen and self.target == "both":
                self.tensors[name].view(-1)[i] = before[name][i]
        if smooth is not None:
            self._count(task, smooth)
        if closure or smooth is not None or any(group["lr"] != 0 for group in self.base.param_groups):
            self.steps += 1

    def _count(self, task, smooth):
        for (name, i), counter in self.counters.items():
            pair = [part[name][i] if name in part else None for part in (task, smooth)]
            self.smallest = min(self.smallest, *(abs(g) for g in pair if g), math.inf)
            counter.update(*pair)
        self.perturbed_steps += 1
        if self.perturbed_steps % self.policy.window == 0:
            elements = self._elements()
            counters = [self.counters[e] for e in elements]
            judge = of(JUDGES, self.policy)
            mask = judge(self.policy, counters, [self.frozen[e] for e in elements], self.windows)
            self.windows += 1
            self.frozen = dict(zip(elements, mask, strict=True))
            self.judged = {e: shown(self.counters[e]) for e in elements}
            for counter in counters:
                counter.reset()

    def report(self):
        """For each scale its value, disorders, conflict, opposition and frozen fraction, means over its elements."""
        rows = {}
        for name in (name for name in SHAPES if name in self.tensors and is_scale(name)):
            elements = [e for e in self._elements() if e[0] == name]
            if self.windows:
                table = [self.judged.get(e, [math.nan] * 4) for e in elements]
            else:
                table = [shown(self.counters[e]) for e in elements]
            statistics = [known_mean(column) for column in zip(*table, strict=True)]
            values = self.theta[name]
            frozen = sum(self.frozen[e] for e in elements) / len(elements)
            rows[name] = [sum(values) / len(values), *statistics, frozen]
        return rows


class Shown:
    """What a counter showed at the end of its window."""

    def __init__(self, values):
        self.values = values

    def disorder(self, part):
        return self.values[part == "smooth"]

    def conflict(self):
        return self.values[2]

    def opposition(self):
        return self.values[3]


def shown(counter):
    return [counter.disorder("task"), counter.disorder("smooth"), counter.conflict(), counter.opposition()]


def known_mean(values):
    known = [v for v in values if not math.isnan(v)]
    return sum(known) / len(known) if known else math.nan

"""Slow and obvious references: Python floats (float64) and loops, straight from the equations.

Nothing here uses autograd, tensors' arithmetic, or the package itself. Python's ``round`` rounds ties to even.
"""

import math


def lsq(v, scales, grad, qmin, qmax, grad_scale=1.0):
    """LSQ forward and backward, element by element.

    Args:
        v, scales, grad: lists of floats, one entry an element: value, its scale, dL/dv_hat.

    Returns:
        v_hat, dv (lists), ds_terms (list: each element's contribution to the gradient of its scale).
    """
    v_hat, dv, ds_terms = [], [], []
    for x, s, g in zip(v, scales, grad, strict=True):
        u = x / s
        if u <= qmin:
            q, inside, d = qmin, 0.0, qmin
        elif u >= qmax:
            q, inside, d = qmax, 0.0, qmax
        else:
            q = round(u)
            inside, d = 1.0, q - u
        v_hat.append(q * s)
        dv.append(g * inside)
        ds_terms.append(grad_scale * g * d)
    return v_hat, dv, ds_terms


class TanhRegression:
    """L(w, b, c) = mean over samples of (c * tanh(sum_i w_i x_i + b) - y)^2, with its gradient by hand.

    Parameters are one flat list [w_1 .. w_n, b, c].
    """

    def __init__(self, xs, ys):
        self.xs, self.ys = xs, ys

    def gradient(self, theta):
        *w, b, c = theta
        total = [0.0] * len(theta)
        for x, y in zip(self.xs, self.ys, strict=True):
            t = math.tanh(sum(wi * xi for wi, xi in zip(w, x, strict=True)) + b)
            residual = 2 * (c * t - y) / len(self.xs)
            inner = residual * c * (1 - t * t)
            for i, xi in enumerate(x):
                total[i] += inner * xi
            total[-2] += inner
            total[-1] += residual * t
        return total


class SignCounter:
    """Disorder, conflict and opposition of one scale element, from method.md section 3."""

    def __init__(self):
        self.previous = {"task": 0, "smooth": 0}
        self.present = {"task": False, "smooth": False}
        self.reset()

    def reset(self):
        self.flips = {"task": 0, "smooth": 0}
        self.compared = {"task": 0, "smooth": 0}
        self.sums = {"task": 0.0, "smooth": 0.0}
        self.conflicts = self.pairs = 0

    def update(self, task, smooth):
        """Count a step; ``None`` for a gradient that is missing."""
        for part, g in (("task", task), ("smooth", smooth)):
            if g is None:
                self.present[part] = False
                continue
            sign = (g > 0) - (g < 0) or self.previous[part]
            if self.present[part] and self.previous[part] != 0:
                self.compared[part] += 1
                self.flips[part] += sign != self.previous[part]
            self.previous[part], self.present[part] = sign, True
            self.sums[part] += g
        if all(self.present.values()) and all(self.previous.values()):
            self.pairs += 1
            self.conflicts += self.previous["task"] != self.previous["smooth"]

    def disorder(self, part):
        return self.flips[part] / self.compared[part] if self.compared[part] else math.nan

    def conflict(self):
        return self.conflicts / self.pairs if self.pairs else math.nan

    def opposition(self):
        return float(self.sums["task"] * self.sums["smooth"] < 0) if self.pairs else math.nan


class SGDTwoPass:
    """The whole method on :class:`TanhRegression`: SGD with momentum under SAM or SAGM, with disorder freezing.

    Args:
        problem: the loss.
        theta: starting parameters.
        scales: which entries of theta are scales.
        kind: ``"sagm"`` or ``"sam"``.
        freeze: ``"task"``, ``"smooth"``, ``"both"`` or ``None``.
    """

    def __init__(
        self, problem, theta, *, lr, momentum, kind, rho, alpha, scales=(), window=0, threshold=0.0, freeze=None
    ):
        self.problem, self.theta = problem, list(theta)
        self.lr, self.momentum, self.kind, self.rho, self.alpha = lr, momentum, kind, rho, alpha
        self.scales, self.window, self.threshold, self.freeze = scales, window, threshold, freeze
        self.velocity = [0.0] * len(theta)
        self.counters = {i: SignCounter() for i in scales}
        self.frozen = dict.fromkeys(scales, False)
        self.steps = 0

    def step(self):
        task = self.problem.gradient(self.theta)
        norm = math.sqrt(sum(g * g for g in task))
        factor = self.rho / (norm + 1e-12) - (self.alpha if self.kind == "sagm" else 0.0)
        smooth = self.problem.gradient([t + factor * g for t, g in zip(self.theta, task, strict=True)])
        for i in range(len(self.theta)):
            frozen = self.frozen.get(i, False)
            part_task = 0.0 if frozen and self.freeze in ("task", "both") else task[i]
            part_smooth = 0.0 if frozen and self.freeze in ("smooth", "both") else smooth[i]
            g = (part_task + part_smooth) / 2 if self.kind == "sagm" else part_smooth
            self.velocity[i] = self.momentum * self.velocity[i] + g
            if not (frozen and self.freeze == "both"):
                self.theta[i] -= self.lr * self.velocity[i]
        self.steps += 1
        for i, counter in self.counters.items():
            counter.update(task[i], smooth[i])
        if self.window and self.steps % self.window == 0:
            for i, counter in self.counters.items():
                self.frozen[i] = counter.disorder("task") < self.threshold
                counter.reset()

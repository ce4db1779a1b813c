"""Disorder, conflict and opposition of one scale, counted in plain Python."""

import math


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

"""Sharpness-aware minimisation as it is usually written: what tests of user pains must be able to fail.

Own code, in the usual shape: a class for the base, groups shared by alias, the displacement kept in the state and
subtracted again, a step that is two calls of the user. No line of it is meant to be copied.
"""

import torch


class NaiveSAM(torch.optim.Optimizer):
    def __init__(self, params, base_class, rho=0.05, interval=1, **arguments):
        super().__init__(params, {"rho": rho})
        self.base_optimizer = base_class(self.param_groups, **arguments)
        self.param_groups = self.base_optimizer.param_groups
        self.interval = interval
        self.steps = 0

    @torch.no_grad()
    def first_step(self, zero_grad=False):
        self.steps += 1
        if self.interval > 1 and self.steps % self.interval != 1:
            return  # a cheap step: nothing is displaced
        norm = self._grad_norm()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                displacement = p.grad * (group["rho"] / (norm + 1e-12)).to(p)
                p.add_(displacement)
                self.state[p]["e_w"] = displacement
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad=False):
        if self.interval == 1 or self.steps % self.interval == 1:
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is None:
                        continue
                    p.sub_(self.state[p]["e_w"])
        self.base_optimizer.step()
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def step(self, closure=None):
        assert closure is not None, "this optimizer requires closure, but it was not provided"
        closure = torch.enable_grad()(closure)
        self.first_step(zero_grad=True)  # with the gradients that the caller has left in .grad
        closure()
        self.second_step()

    def _grad_norm(self):
        return torch.stack(
            [p.grad.norm() for group in self.param_groups for p in group["params"] if p.grad is not None]
        ).norm()

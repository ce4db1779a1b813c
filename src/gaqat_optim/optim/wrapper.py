"""A ``torch.optim.Optimizer`` around another one: what is the base's, and what every optimizer of torch has."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from typing_extensions import override


def _forwarded_to_base(name: str, doc: str) -> property:
    """A property onto the base's attribute: an alias would go stale when the base loads a state dict."""
    return property(lambda self: getattr(self.base, name), lambda self, value: setattr(self.base, name, value), doc=doc)


def _fixed(name: str, doc: str) -> property:
    """A property that cannot be assigned: groups, names and counters were made of what it holds."""

    def refuse(self: OptimizerAroundBase, value: Any) -> None:
        raise AttributeError(
            f"{name} cannot be replaced: build another {type(self).__name__} around the new one and load this one's "
            "state_dict() into it"
        )

    return property(lambda self: getattr(self, f"_{name}"), refuse, doc=doc)


def _of_other_loop(name: str) -> property:
    def refuse(self: OptimizerAroundBase) -> None:
        raise AttributeError(
            f"{type(self).__name__} has no {name}(). For the loop first_step(); second_step() of other packages write\n"
            "    loss.backward()\n"
            "    with optimizer.perturbed():\n"
            "        loss_fn(model(x), y).backward()\n"
            "    optimizer.step()\n"
            "    optimizer.zero_grad()\n"
            "or give step() a closure that clears the gradients, computes the loss and calls backward()"
        )

    return property(refuse)


class OptimizerAroundBase(torch.optim.Optimizer):
    """Shows the groups, the state and the defaults of a base optimizer as its own.

    A subclass sets ``_base`` and ``_model``, and calls :meth:`_init_hook_registries` where others call
    ``super().__init__``.
    """

    base: Any = _fixed("base", "The base optimizer.")
    model: Any = _fixed("model", "The network.")
    param_groups: Any = _forwarded_to_base("param_groups", "The base optimizer's parameter groups, the very list.")
    state: Any = _forwarded_to_base("state", "The base optimizer's state.")
    defaults: Any = _forwarded_to_base("defaults", "The base optimizer's defaults.")
    # Of a base that has them, as those without a schedule; hasattr() says whether it does.
    train: Any = property(lambda self: self.base.train)
    eval: Any = property(lambda self: self.base.eval)
    # The loop of another package for SAM. Not methods: a framework would take this optimizer for one of those.
    first_step: Any = _of_other_loop("first_step")
    second_step: Any = _of_other_loop("second_step")

    def _init_hook_registries(self) -> None:
        """What ``Optimizer.__init__`` sets beside groups and state."""
        self._optimizer_step_pre_hooks = OrderedDict()
        self._optimizer_step_post_hooks = OrderedDict()
        self._optimizer_state_dict_pre_hooks = OrderedDict()
        self._optimizer_state_dict_post_hooks = OrderedDict()
        self._optimizer_load_state_dict_pre_hooks = OrderedDict()
        self._optimizer_load_state_dict_post_hooks = OrderedDict()
        self._patch_step_function()

    @override
    def __getstate__(self) -> dict[str, Any]:
        # Not Optimizer's, which would keep groups and state alone. Hooks stay behind, as with torch's optimizers, and
        # so does the step that a scheduler puts on the instance.
        return {key: v for key, v in self.__dict__.items() if key != "step" and not key.startswith("_optimizer_")}

    @override
    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._init_hook_registries()

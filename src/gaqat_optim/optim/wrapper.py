"""A ``torch.optim.Optimizer`` around a base optimizer, and the parameters and settings of a base."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from typing import Any

import torch
from torch.nn.parameter import Parameter
from typing_extensions import override

StateDict = dict[str, Any]


def parameters_of(base: torch.optim.Optimizer) -> list[Parameter]:
    """The parameters of all groups of ``base``."""
    return [p for group in base.param_groups for p in group["params"]]


def needs_closure(base: torch.optim.Optimizer) -> bool:
    """Whether ``base.step`` cannot be called without a closure."""
    closure = inspect.signature(base.step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty


def has_setting(base: torch.optim.Optimizer, key: str) -> bool:
    """Whether ``key`` of a parameter group is a setting of ``base``, or of an optimizer that it wraps."""
    wrapped = (value for value in vars(base).values() if isinstance(value, torch.optim.Optimizer))
    return any(key in optimizer.defaults for optimizer in (base, *wrapped))


def _forwarded_to_base(name: str, doc: str) -> property:
    """A property onto the base's attribute: an alias would go stale when the base loads a state dict."""
    return property(lambda self: getattr(self.base, name), lambda self, value: setattr(self.base, name, value), doc=doc)


def _read_only(name: str, doc: str) -> property:
    """A property that cannot be assigned: the optimizer has built its groups, names and counters from it."""

    def refuse(self: OptimizerAroundBase, value: Any) -> None:
        raise AttributeError(
            f"{name} cannot be replaced: build another {type(self).__name__} around the new one and load this one's "
            "state_dict() into it"
        )

    return property(lambda self: getattr(self, f"_{name}"), refuse, doc=doc)


def _absent(name: str) -> property:
    """A method of other packages' SAM optimizers that users look for here."""

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

    base: Any = _read_only("base", "The base optimizer.")
    model: Any = _read_only("model", "The network.")
    param_groups: Any = _forwarded_to_base("param_groups", "The list of the base optimizer's parameter groups itself.")
    state: Any = _forwarded_to_base("state", "The base optimizer's state.")
    defaults: Any = _forwarded_to_base("defaults", "The base optimizer's defaults.")
    # Schedule-free bases have train() and eval(). With others, hasattr() is False here too.
    train: Any = property(lambda self: self.base.train)
    eval: Any = property(lambda self: self.base.eval)
    # hasattr() is False: a framework that finds these methods would call them.
    first_step: Any = _absent("first_step")
    second_step: Any = _absent("second_step")

    def _init_hook_registries(self) -> None:
        """Set the attributes of ``Optimizer.__init__`` other than groups and state."""
        for event in ("step", "state_dict", "load_state_dict"):
            setattr(self, f"_optimizer_{event}_pre_hooks", OrderedDict())
            setattr(self, f"_optimizer_{event}_post_hooks", OrderedDict())
        self._patch_step_function()

    def _through_hooks(self, hooks: Any, state_dict: StateDict) -> StateDict:
        """``state_dict`` after ``hooks``, each of which may return another one."""
        for hook in hooks.values():
            state_dict = hook(self, state_dict) or state_dict
        return state_dict

    @override
    def __getstate__(self) -> dict[str, Any]:
        # Optimizer's own __getstate__ keeps groups and state only. As with torch's optimizers, hooks are not copied,
        # nor is the step() that a scheduler sets on the instance.
        return {key: v for key, v in self.__dict__.items() if key != "step" and not key.startswith("_optimizer_")}

    @override
    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._init_hook_registries()

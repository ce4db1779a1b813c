"""An output quantizer behind any module: a child of it, which a forward hook calls."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn


def quantize_output(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """A forward hook that calls the child ``output_quantizer`` of ``module`` on its output."""
    return module.output_quantizer(output)  # type: ignore[operator]


def has_hooks(module: nn.Module) -> bool:
    """Whether ``module`` has forward hooks or pre-hooks of the user, which may read or change what goes through it."""
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return any(hook is not quantize_output for hook in hooks)


def modules_with_output_quantizer(model: nn.Module) -> Iterator[nn.Module]:
    """The modules with that hook: modules that are no quantized layers and have an output quantizer."""
    for module in model.modules():
        if quantize_output in module._forward_hooks.values():
            yield module


def attach(module: nn.Module, quantizer: nn.Module) -> None:
    """Put ``quantizer`` behind ``module``."""
    module.register_forward_hook(quantize_output)
    module.output_quantizer = quantizer


def detach(module: nn.Module) -> None:
    """Remove the quantizer that :func:`attach` put behind ``module``."""
    for key, hook in list(module._forward_hooks.items()):
        if hook is quantize_output:
            del module._forward_hooks[key]
    del module.output_quantizer

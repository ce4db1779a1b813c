"""A network as a tree of named modules: how modules are replaced, and which tensors they share."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn


def join(prefix: str, name: str) -> str:
    """The qualified name of ``name`` in the module ``prefix``.

    >>> join("", "weight"), join("blocks.0", "weight")
    ('weight', 'blocks.0.weight')
    """
    return f"{prefix}.{name}" if prefix else name


def replace_modules(model: nn.Module, replacement: Callable[[str, nn.Module], nn.Module]) -> nn.Module:
    """Replace the modules of a network, each before its children, in place.

    ``replacement`` is called once for each module, with its first name. It returns a new module, whose children are
    replaced next, or the module itself. The result is the replacement of ``model``.

    >>> net = nn.Sequential(nn.Dropout())
    >>> replace_modules(net, lambda name, module: nn.Identity() if name == "0" else module)
    Sequential(
      (0): Identity()
    )
    """
    replaced: dict[nn.Module, nn.Module] = {}
    waiting = [("", model)]
    while waiting:
        name, module = waiting.pop()
        if module not in replaced:
            replaced[module] = replacement(name, module)
            children = reversed(replaced[module]._modules.items())
            waiting += [(join(name, slot), child) for slot, child in children if child is not None]
    for module in set(replaced.values()):  # One module can replace several.
        for slot, child in module._modules.items():
            module._modules[slot] = None if child is None else replaced[child]
    return replaced[model]


def shared_tensors(model: nn.Module) -> list[tuple[list[str], Tensor]]:
    """All parameters and buffers, persistent or not, each once with all its names.

    >>> layer = nn.Linear(2, 2, bias=False)
    >>> [names for names, _ in shared_tensors(nn.Sequential(layer, layer))]
    [['0.weight', '1.weight']]
    """
    tensors: dict[int, tuple[list[str], Tensor]] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None:
                tensors.setdefault(id(tensor), ([], tensor))[0].append(join(prefix, name))
    return list(tensors.values())

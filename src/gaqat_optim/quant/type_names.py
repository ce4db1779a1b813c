"""Module types as strings, for files that another process reads."""

from __future__ import annotations

import pkgutil


def type_name(kind: type) -> str:
    """The name by which :func:`type_named` finds ``kind`` again.

    Raises:
        ValueError: it cannot be found so, for example because it was defined in a function.

    >>> from torch import nn
    >>> type_name(nn.Linear)
    'torch.nn.modules.linear.Linear'
    """
    name = f"{kind.__module__}.{kind.__qualname__}"
    if "<locals>" in name:
        raise ValueError(f"the type {name} was defined in a function, where no other process finds it")
    return name


def type_named(name: str) -> type:
    """The type that :func:`type_name` gave the name.

    Raises:
        ValueError: importing its module fails, or the name is no type's.
    """
    try:
        kind = pkgutil.resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"there is no type {name!r} here: {type(error).__name__}: {error}") from error
    if not isinstance(kind, type):
        raise ValueError(f"{name!r} is no type but {kind!r}")
    return kind

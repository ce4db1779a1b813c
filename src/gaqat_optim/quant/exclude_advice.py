"""The ``exclude=`` that an error or a warning recommends."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

from torch import nn


def exclude_argument(model: nn.Module, names: Iterable[str], exclude: Iterable[str]) -> str:
    """The ``exclude`` of a configuration that leaves the modules ``names`` of ``model`` in floating point.

    It begins with what the configuration excludes already. Repeated blocks share a pattern, if it matches nothing else.

    >>> blocks = nn.Sequential(*[nn.ModuleDict({"fc": nn.Linear(2, 2), "out": nn.Linear(2, 2)}) for _ in range(99)])
    >>> exclude_argument(blocks, [f"{i}.fc" for i in range(99)], exclude=("5.out",))
    "exclude=('5.out', '*.fc')"
    """
    names = list(names)
    others = {name for name, _ in model.named_modules(remove_duplicate=False)} - set(names)
    patterns: dict[str, None] = {}
    for name in names:
        pattern = ".".join("*" if part.isdigit() else part for part in name.split("."))
        patterns[name if any(fnmatchcase(other, pattern) for other in others) else pattern] = None
    return f"exclude={(*exclude, *patterns)!r}"

"""Modules that cannot be quantized, and what to do instead: an error, where a part would silently be left out.

The ``exclude=`` that errors and warnings recommend is made here too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize

from .registry import QUANTIZED, quantized_class

# What the quantizers compute with.
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def unsupported_reason(module: nn.Module) -> str | None:
    """Why ``module`` cannot be quantized, where a user would expect it to be; ``None`` where there is no reason.

    >>> unsupported_reason(nn.Linear(2, 2)) is None
    True
    >>> print(unsupported_reason(nn.GRU(2, 2)))
    GRU has its recurrence in one kernel, without a place for quantizers: write it with nn.Linear
    """
    kind = type(module).__name__
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        return f"{kind} has its recurrence in one kernel, without a place for quantizers: write it with nn.Linear"
    if isinstance(module, LazyModuleMixin):
        return f"{kind} has no shape yet: run one forward pass before quantize_model"
    if parametrize.is_parametrized(module) and any(base in QUANTIZED for base in type(module).__mro__):
        return f"{kind} computes its weight: fold that in with torch.nn.utils.parametrize.remove_parametrizations"
    if quantized_class(type(module)) is None:
        return None
    if "forward" in vars(module):  # which would be that of the float layer
        return f"{kind} has a forward that was put on the instance, as by accelerate's hooks: remove it first"
    if "weight" in vars(module):
        return f"{kind} computes its weight in a hook: fold that in with remove_weight_norm or remove_spectral_norm"
    for parameter in module.parameters(recurse=False):
        if parameter.dtype not in _DTYPES:
            return f"{kind} has a parameter of {parameter.dtype}: give it a real floating-point type of 16 bits or more"
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        if module.sparse:
            return f"{kind} has sparse gradients, which do not pass through a quantizer: build it with sparse=False"
        if module.max_norm is not None:
            return f"{kind} changes its weight in every forward: build it with max_norm=None"
    if isinstance(module, nn.MultiheadAttention):
        out = module.out_proj
        if type(out) not in (NonDynamicallyQuantizableLinear, nn.Linear) or "weight" not in out._parameters:
            return f"{kind} has a {type(out).__name__} as out_proj: only torch's own can be quantized"
        packed, separate = ("in_proj_weight",), ("q_proj_weight", "k_proj_weight", "v_proj_weight")
        for name in packed if module._qkv_same_embed_dim else separate:
            if module._parameters.get(name) is None:
                return f"{kind} computes its {name} in a hook: fold that in with remove_weight_norm or the like"
    return None


def refuse(model: nn.Module, refusals: Sequence[tuple[str, str]], exclude: Iterable[str]) -> None:
    """Raise for all modules that cannot be quantized, each with its qualified name and reason, if there are any.

    >>> refuse(nn.ModuleDict({"rnn": nn.GRU(2, 2)}), [("rnn", "GRU has its recurrence in one kernel")], exclude=())
    Traceback (most recent call last):
    ValueError: 'rnn' cannot be quantized. GRU has its recurrence in one kernel; or leave it ... with exclude=('rnn',)
    """
    if not refusals:
        return
    name, reason = refusals[0]
    if not name:
        raise ValueError(f"the model cannot be quantized. {reason}")
    advice = f"with {exclude_argument(model, (name for name, _ in refusals), exclude)}"
    if len(refusals) == 1:
        raise ValueError(f"{name!r} cannot be quantized. {reason}; or leave it as it is {advice}")
    lines = "".join(f"\n  {name!r}: {reason}" for name, reason in refusals)
    raise ValueError(f"{len(refusals)} modules cannot be quantized:{lines}\nOr leave them as they are {advice}")


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

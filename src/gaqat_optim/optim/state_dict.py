"""The state dict of a base optimizer with the freezing state of the scales in it, and apart again.

The freezing state goes where every checkpointing tool looks: into the state of each scale parameter and into the
parameter groups. It is there in state dicts only. In the base's run-time state it would do harm: Adam takes a state
that is not empty for one that it has set up.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn.parameter import Parameter

from .freezing import FreezePolicy

_STATE = "gaqat"
# What is in every parameter group, by the attribute of Freezing. All are numbers: no checkpointing tool refuses those.
_NUMBERS = {name: f"gaqat_{name}" for name in ("steps", "perturbed_steps", "windows", "policy")}

StateDict = dict[str, Any]
Groups = list[dict[str, Any]]


@dataclass(frozen=True)
class FreezingState:
    """What a state dict holds beside the base's part.

    Attributes:
        scales: the packed state of each scale.
        steps: number of steps made.
        perturbed_steps: number of those with a second pass.
        windows: number of windows judged.
        policy: :func:`policy_number` of the policy that judged them.
    """

    scales: Mapping[Parameter, Tensor]
    steps: int
    perturbed_steps: int
    windows: int
    policy: int


def policy_number(policy: FreezePolicy) -> int:
    """A number that is the same for policies of one class and settings, in every process."""
    settings = sorted(getattr(policy, "__dict__", {}).items())
    # The default repr of an object ends with its address, which is another one in every run.
    described = re.sub(r" at 0x[0-9a-f]+", "", f"{type(policy).__qualname__}{settings}")
    return zlib.crc32(described.encode())


def embed(base: StateDict, groups: Groups, freezing: FreezingState) -> StateDict:
    """``base``, a state dict of the optimizer with these ``groups``, with ``freezing`` in it."""
    _check_form(base)
    ids = dict(_pairs(groups, base["param_groups"]))
    # With an entry for every parameter or for none: torch's distributed checkpoints refuse anything between, which
    # those of the scales alone would be beside a base without state.
    state = {**({i: {} for i in ids.values()} if freezing.scales else {}), **base["state"]}
    for p, packed in ((p, packed) for p, packed in freezing.scales.items() if p in ids):
        state[ids[p]] = {**state[ids[p]], _STATE: packed}  # A copy: the entry is the base's run-time state.
    numbers = {key: getattr(freezing, name) for name, key in _NUMBERS.items()}
    return {**base, "state": state, "param_groups": [{**group, **numbers} for group in base["param_groups"]]}


def extract(state_dict: StateDict, groups: Groups) -> tuple[StateDict, FreezingState | None]:
    """The base's state dict, and what :func:`embed` put into it; ``None`` for a state dict of the base alone."""
    _check_form(state_dict)
    saved_groups, saved_state = state_dict["param_groups"], state_dict["state"]
    # A base may keep what belongs to no parameter there too, under a name and as anything.
    state = {key: _without_ours(entry) for key, entry in saved_state.items()}
    base = {
        **state_dict,
        "state": {key: entry for key, entry in state.items() if entry is not None},
        "param_groups": [{k: v for k, v in group.items() if k not in _NUMBERS.values()} for group in saved_groups],
    }
    if not saved_groups or _NUMBERS["steps"] not in saved_groups[0]:
        if any(isinstance(i, str) for group in saved_groups for i in group["params"]):
            # Nothing may be lost without a word, and this is how set_optimizer_state_dict loses it.
            raise ValueError(
                "the state dict has names for parameters, as in distributed checkpoints, and no freezing state. Leave "
                "flatten_optimizer_state_dict out, which drops it; load a checkpoint of the base optimizer into .base"
            )
        return base, None
    # Ids come from the saved groups, never from counting: distributed checkpoints use names for them.
    scales = {p: saved_state[i][_STATE] for p, i in _pairs(groups, saved_groups) if _STATE in saved_state.get(i, {})}
    return base, FreezingState(scales, *(int(saved_groups[0][key]) for key in _NUMBERS.values()))


def _check_form(state_dict: StateDict) -> None:
    if missing := {"state", "param_groups"} - state_dict.keys():
        raise ValueError(
            f"a state dict of the base has no {' and no '.join(map(repr, sorted(missing)))}, as those of torch.optim "
            "have, so that the freezing state has no place in it: save and load optimizer.base.state_dict(), without it"
        )


def _without_ours(entry: Any) -> Any:
    """An entry of the state without the freezing state; ``None`` for one that is empty then."""
    if not isinstance(entry, Mapping):
        return entry
    return {key: value for key, value in entry.items() if key != _STATE} or None


def _pairs(groups: Groups, saved: Groups) -> Iterator[tuple[Parameter, Any]]:
    """Each parameter with its id in the saved groups."""
    for group, saved_group in zip(groups, saved, strict=False):
        yield from zip(group["params"], saved_group["params"], strict=False)

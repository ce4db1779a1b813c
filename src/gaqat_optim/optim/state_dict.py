"""The base's state dict with the freezing state of the scales embedded, and extracted again.

The freezing state goes where every checkpointing tool looks: into the state of each scale parameter and into the
parameter groups. It is in state dicts only. Were it in the base's run-time state, Adam would take the state of a scale
for complete, and never create its own.
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
from .wrapper import StateDict

Groups = list[dict[str, Any]]

_STATE_KEY = "gaqat"
# The keys in every parameter group, by the attribute of FreezingState. Every checkpointing tool takes numbers.
_GROUP_KEYS = {name: f"gaqat_{name}" for name in ("steps", "perturbed_steps", "windows", "policy")}


@dataclass(frozen=True)
class FreezingState:
    """What a state dict holds beside the base's part."""

    scales: Mapping[Parameter, Tensor]  # the state tensor of each scale
    steps: int
    perturbed_steps: int
    windows: int  # judged so far
    policy: int  # policy_number of the policy that judged them


def policy_number(policy: FreezePolicy) -> int:
    """A number that is the same for policies of one class and settings, in every process."""
    attributes = sorted(getattr(policy, "__dict__", {}).items())
    # The default repr of an object ends with its address, which changes from run to run.
    description = re.sub(r" at 0x[0-9a-f]+", "", f"{type(policy).__qualname__}{attributes}")
    return zlib.crc32(description.encode())


def embed(base: StateDict, groups: Groups, freezing: FreezingState) -> StateDict:
    """``base``, a state dict of the optimizer with these ``groups``, with ``freezing`` in it."""
    _check_keys(base)
    ids = dict(_parameter_ids(groups, base["param_groups"]))
    # torch's distributed checkpoints want an entry for every parameter or for none.
    state = {**({key: {} for key in ids.values()} if freezing.scales else {}), **base["state"]}
    for p, tensor in freezing.scales.items():
        if p in ids:
            state[ids[p]] = {**state[ids[p]], _STATE_KEY: tensor}  # A new dict: the old one is the base's own state.
    numbers = {key: getattr(freezing, name) for name, key in _GROUP_KEYS.items()}
    return {**base, "state": state, "param_groups": [{**group, **numbers} for group in base["param_groups"]]}


def extract(state_dict: StateDict, groups: Groups) -> tuple[StateDict, FreezingState | None]:
    """The base's state dict, and the freezing state; ``None`` if the state dict is of the base alone."""
    _check_keys(state_dict)
    saved_groups, saved_state = state_dict["param_groups"], state_dict["state"]
    state = {key: _base_entry(entry) for key, entry in saved_state.items()}
    base = {
        **state_dict,
        "state": {key: entry for key, entry in state.items() if entry is not None},
        "param_groups": [{k: v for k, v in group.items() if k not in _GROUP_KEYS.values()} for group in saved_groups],
    }
    if not saved_groups or _GROUP_KEYS["steps"] not in saved_groups[0]:
        if any(isinstance(i, str) for group in saved_groups for i in group["params"]):
            raise ValueError(
                "the state dict has names for parameters, as in distributed checkpoints, and no freezing state. Leave "
                "flatten_optimizer_state_dict out, which drops it; load a checkpoint of the base optimizer into .base"
            )
        return base, None
    # Ids come from the saved groups, never from counting: distributed checkpoints use names for them.
    ids = _parameter_ids(groups, saved_groups)
    scales = {p: saved_state[i][_STATE_KEY] for p, i in ids if _STATE_KEY in saved_state.get(i, {})}
    return base, FreezingState(scales, *(int(saved_groups[0][key]) for key in _GROUP_KEYS.values()))


def _check_keys(state_dict: StateDict) -> None:
    if missing := {"state", "param_groups"} - state_dict.keys():
        raise ValueError(
            f"a state dict of the base has no {' and no '.join(map(repr, sorted(missing)))}, as those of torch.optim "
            "have, so that the freezing state has no place in it: save and load optimizer.base.state_dict(), without it"
        )


def _base_entry(entry: Any) -> Any:
    """An entry of the state without the freezing state; ``None`` if nothing else is in it."""
    if not isinstance(entry, Mapping):  # A base may store anything under a name.
        return entry
    return {key: value for key, value in entry.items() if key != _STATE_KEY} or None


def _parameter_ids(groups: Groups, saved_groups: Groups) -> Iterator[tuple[Parameter, Any]]:
    """Each parameter with its id in the saved groups."""
    for group, saved_group in zip(groups, saved_groups, strict=False):
        yield from zip(group["params"], saved_group["params"], strict=False)

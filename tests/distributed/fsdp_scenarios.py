"""What the ranks of ``fully_shard`` do in the tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from gaqat_optim import SAGM, DisorderFreeze, GAQATOptimizer, LSQQuantizer, QuantConfig, quantize_model

from .processes import (
    data,
    frozen_fractions,
    full_parameters,
    loss_of,
    network,
    optimizer_for,
    part_of,
    quantized,
    sgd,
    train,
)
from .training_scenarios import sharded


def mixed_precision(rank: int, ranks: int, folder: Path) -> Any:
    """bfloat16 in the passes: of everything, and of everything but the scales."""
    results = {}
    for name, own_units in {"all": False, "scales in float32": True}.items():
        model = quantize_model(network().float(), QuantConfig(4, 4), calibration=data()[0].float())
        if own_units:
            mesh = init_device_mesh("cpu", (ranks,))
            keep = MixedPrecisionPolicy(cast_forward_inputs=False)
            for module in model.modules():
                if isinstance(module, LSQQuantizer):
                    fully_shard(module, mesh=mesh, mp_policy=keep)
        dtypes = []
        model[0].weight_quantizer.register_forward_pre_hook(
            lambda module, args, dtypes=dtypes: dtypes.append(f"{args[0].dtype} {module.raw_scale.dtype}")
        )
        sharded(ranks, model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
        optimizer = optimizer_for(model)
        x, y = part_of(rank, ranks)
        losses = []

        def closure(model=model, optimizer=optimizer, x=x, y=y, losses=losses):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x.float()).float(), y)
            loss.backward()
            losses.append(loss.item())
            return loss

        for _ in range(8):
            optimizer.step(closure)
        results[name] = {"losses": losses[0::2], "dtypes": dtypes[-1], "parameters": full_parameters(model)}
    return results


def half_precision_model(rank: int, ranks: int, folder: Path) -> Any:
    """A bfloat16 network with float32 scales: units of its own for the scales, since a unit has one dtype."""
    x, y = data()
    model = quantize_model(network().bfloat16(), QuantConfig(4, 4), calibration=x.bfloat16())
    mesh = init_device_mesh("cpu", (ranks,))
    for module in model.modules():
        if isinstance(module, LSQQuantizer):
            fully_shard(module, mesh=mesh)
    sharded(ranks, model)
    optimizer = optimizer_for(model)
    x, y = part_of(rank, ranks)
    train(model, optimizer, x.bfloat16(), y, 3)
    return full_parameters(model)


def restored(rank: int, ranks: int, folder: Path) -> Any:
    """The local parts of parameters and gradients around the block, whether it ends well or raises."""
    model = sharded(ranks)
    optimizer = optimizer_for(model)
    x, y = part_of(rank, ranks)
    train(model, optimizer, x, y, 4)
    optimizer.zero_grad()
    loss_of(model, x, y).backward()

    def local() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        parameters = list(model.parameters())
        return (
            [p.detach().to_local().clone() for p in parameters],
            [p.grad.to_local().clone() for p in parameters],
        )

    before = local()
    moved = False
    try:
        with optimizer.perturbed():
            inside = [p.detach().to_local().clone() for p in model.parameters()]
            moved = not all(torch.equal(a, b) for a, b in zip(inside, before[0], strict=True))
            loss_of(model, x, y).backward()
            raise KeyError("in the block")
    except KeyError:
        pass
    failed = local()
    with optimizer.perturbed():
        loss_of(model, x, y).backward()
    return {"before": before, "failed": failed, "after": local(), "moved": moved}


def uncalibrated(rank: int, ranks: int, folder: Path) -> Any:
    model = sharded(ranks, quantize_model(network(), QuantConfig(3, 3)).double())
    try:
        model(part_of(rank, ranks)[0])
    except RuntimeError as error:
        return str(error)
    return ""


def from_meta(rank: int, ranks: int, folder: Path) -> Any:
    """A network sharded on the meta device takes its scales from a state dict, and is then calibrated."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    source = quantized()
    with torch.device("meta"):
        model = quantize_model(network(), QuantConfig(3, 3)).double()
    sharded(ranks, model)
    model.to_empty(device="cpu")
    set_model_state_dict(model, source.state_dict(), options=StateDictOptions(full_state_dict=True))
    optimizer = optimizer_for(model)
    train(model, optimizer, *part_of(rank, ranks))
    return full_parameters(model), frozen_fractions(optimizer)


def beyond_bounds(rank: int, ranks: int, folder: Path) -> Any:
    """A scale pushed beyond its bound: what the passes use, and where training brings it."""
    model = sharded(ranks)
    quantizer = model[2].weight_quantizer
    used: list[torch.Tensor] = []
    quantizer.register_forward_hook(lambda module, args, y: used.append(module.scale.detach().clone()))
    with torch.no_grad():
        quantizer.raw_scale.add_(10.0)  # e**10 is more than the factor of 1024
    bound = quantizer.scale_range[1].clone()
    optimizer = GAQATOptimizer(sgd(model), model, perturbation=SAGM(0.0), freezing=DisorderFreeze(3))
    start = quantizer.raw_scale.full_tensor().detach().clone()
    x, y = part_of(rank, ranks)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, x, y) + model[2].weight_quantizer_penalty()
        loss.backward()
        return loss

    # A pull on the effective scale itself, as the data may not use so coarse a weight.
    model[2].weight_quantizer_penalty = lambda: penalties[-1]
    penalties: list[torch.Tensor] = []
    quantizer.register_forward_hook(lambda module, args, y: penalties.append(module.scale.log().sum()))
    for _ in range(40):
        optimizer.step(closure)
    end = quantizer.raw_scale.full_tensor().detach().clone()
    return {"used": torch.stack(used), "bound": bound, "start": start, "end": end}


def per_rank(rank: int, ranks: int, folder: Path) -> Any:
    """``per_rank=True``, which needs the full gradients of each rank."""
    model = sharded(ranks)
    optimizer = optimizer_for(model)
    loss_of(model, *part_of(rank, ranks)).backward()
    try:
        with optimizer.perturbed(per_rank=True):
            loss_of(model, *part_of(rank, ranks)).backward()
    except ValueError as error:
        return str(error)
    return ""


SCENARIOS = {
    "fsdp mixed precision": mixed_precision,
    "fsdp half precision model": half_precision_model,
    "fsdp restored": restored,
    "fsdp uncalibrated": uncalibrated,
    "fsdp from meta": from_meta,
    "fsdp beyond bounds": beyond_bounds,
    "fsdp per rank": per_rank,
}

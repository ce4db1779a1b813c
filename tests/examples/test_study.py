"""Methods, mini-batches, splits, training and model selection."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from itertools import islice

import pytest
import torch
from torch import Tensor, nn

from domain_generalization import study
from gaqat_optim import GAQATOptimizer, LSQQuantizer

MakeTrainer = Callable[..., study.Trainer]


def test_endless_indices_visit_everything_once_a_round() -> None:
    stream = study.endless_indices(10, 4, torch.Generator().manual_seed(0))
    drawn = torch.cat(list(islice(stream, 5)))
    assert drawn[:10].sort().values.tolist() == drawn[10:].sort().values.tolist() == list(range(10))
    assert drawn[:10].tolist() != drawn[10:].tolist()


def test_a_batch_may_be_larger_than_the_domain() -> None:
    first = next(study.endless_indices(3, 7, torch.Generator().manual_seed(0)))
    assert first.bincount().tolist() in ([3, 2, 2], [2, 3, 2], [2, 2, 3])


def test_batches_hold_the_same_number_of_each_domain_and_follow_their_seed() -> None:
    domains = [(torch.full((9, 1), float(number)), torch.full((9,), number)) for number in range(3)]
    x, y = next(study.endless_batches(domains, 5, seed=0))
    assert y.bincount().tolist() == [5, 5, 5]
    assert torch.equal(x[:, 0].long(), y)

    numbered = [(torch.arange(9.0)[:, None], torch.arange(9))]
    first, again, other = (
        torch.cat([y for _, y in islice(study.endless_batches(numbered, 4, seed=seed), 6)]) for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_split_is_disjoint_complete_and_follows_its_seed() -> None:
    training, holdout = study.split_indices(50, 0.2, seed=1)
    assert len(holdout) == 10
    assert torch.cat([training, holdout]).sort().values.tolist() == list(range(50))
    assert torch.equal(holdout, study.split_indices(50, 0.2, seed=1)[1])
    assert not torch.equal(holdout, study.split_indices(50, 0.2, seed=2)[1])
    assert len(study.split_indices(3, 0.1, seed=0)[1]) == 1


@pytest.mark.parametrize("name", study.METHODS)
def test_every_method_trains_a_quantized_copy(
    name: str, trainer: MakeTrainer, small_network: Callable[[], nn.Module], settings: study.Settings
) -> None:
    checkpoint = small_network()
    before = copy.deepcopy(checkpoint.state_dict())
    losses: list[float] = []
    run = trainer(progress=losses.append).quantized(checkpoint, study.METHODS[name])
    flat = settings.flat_steps if study.METHODS[name].flat_start else 0
    assert len(losses) == settings.steps + flat
    assert all(torch.equal(value, before[key]) for key, value in checkpoint.state_dict().items())
    quantizers = [module for module in run.last.modules() if isinstance(module, LSQQuantizer)]
    assert {quantizer.bits for quantizer in quantizers} == {3, 8}
    assert run.selected_step in (2, 4, 6)


def test_the_methods_are_what_they_are_called(small_network: Callable[[], nn.Module], settings: study.Settings) -> None:
    model = small_network()
    plain = study.build_optimizer(model, study.METHODS["lsq"], settings)
    assert type(plain) is torch.optim.Adam
    for name in ("lsq+sagm", "gaqat", "gaqat-flat"):
        assert isinstance(study.build_optimizer(model, study.METHODS[name], settings), GAQATOptimizer)


def test_methods_see_the_same_batches(
    trainer: MakeTrainer, small_network: Callable[[], nn.Module], settings: study.Settings
) -> None:
    seen: list[list[Tensor]] = []
    for name in ("lsq", "gaqat"):
        batches: list[Tensor] = []

        def step(
            model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, into: list[Tensor] = batches
        ) -> float:
            into.append(x)
            return study.closure_step(model, optimizer, x, y)

        trainer().quantized(small_network(), study.METHODS[name], step=step)
        seen.append(batches)
    assert len(seen[0]) == settings.steps
    assert all(torch.equal(first, second) for first, second in zip(*seen, strict=True))


def test_the_best_validated_state_is_kept_and_later_steps_do_not_touch_it(
    trainer: MakeTrainer, small_network: Callable[[], nn.Module]
) -> None:
    states: list[dict[str, Tensor]] = []
    scores = iter([50.0, 70.0, 70.0])

    def validate(model: nn.Module) -> float:
        states.append(copy.deepcopy(model.state_dict()))
        return next(scores)

    run = trainer(validate=validate).quantized(small_network(), study.METHODS["lsq"])
    assert (run.validation, run.selected_step, len(states)) == (70.0, 4, 3)
    selected, last = run.selected.state_dict(), run.last.state_dict()
    assert all(torch.equal(selected[key], states[1][key]) for key in selected)
    assert any(not torch.equal(selected[key], last[key]) for key in selected)


def test_every_ambiguity_of_settings_is_passed_to_the_quantization(settings: study.Settings) -> None:
    config = replace(settings, bits=5).quantization()
    assert (config.weight_bits, config.activation_bits) == (5, 5)
    assert (config.weight_granularity, config.first_last_bits) == ("tensor", 8)

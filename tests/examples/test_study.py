"""The shared training code: batches, splits, methods, model selection and the gradients that are recorded."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from domain_generalization import conflict, digit_domains, digit_study, study
from gaqat_optim import GAQATOptimizer, LSQQuantizer

SETTINGS = study.Settings(
    bits=3,
    steps=6,
    fp32_steps=3,
    flat_steps=2,
    every=2,
    batch_size=4,
    learning_rate=1e-2,
    rho=0.1,
    alpha=1e-3,
    window=2,
    threshold=0.6,
    cosine=True,
    calibration_batches=2,
)


def small_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(36, 8),
        nn.ReLU(),
        nn.Linear(8, 2),
    )


def small_domain(seed: int, count: int = 20) -> study.Batch:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, 8, 8, generator=generator), torch.randint(2, (count,), generator=generator)


def trainer(**changes: object) -> study.Trainer:
    domains = [small_domain(0), small_domain(1)]

    def stream(phase: int) -> Iterator[study.Batch]:
        return study.endless_batches(domains, 4, seed=phase)

    arguments: dict[str, object] = {"validate": lambda model: study.accuracy(model, *domains[0]), **changes}
    return study.Trainer(SETTINGS, stream, **arguments)  # type: ignore[arg-type]


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


def test_the_held_out_domain_is_in_no_part_of_the_training_data() -> None:
    domains = {
        name: digit_domains.Domain(torch.full((10, 1), float(number)), torch.full((10,), number))
        for number, name in enumerate(digit_domains.DOMAINS)
    }
    training, holdouts = digit_study.split_sources(domains, "blended", 0.2, seed=0)
    for part, size in ((training, 8), (holdouts, 2)):
        assert [(y.unique().tolist(), len(y)) for _, y in part] == [([0], size), ([1], size), ([3], size)]


@pytest.mark.parametrize("name", study.METHODS)
def test_every_method_trains_a_quantized_copy(name: str) -> None:
    checkpoint = small_network()
    before = copy.deepcopy(checkpoint.state_dict())
    losses: list[float] = []
    run = trainer(progress=losses.append).quantized(checkpoint, study.METHODS[name])
    flat = SETTINGS.flat_steps if study.METHODS[name].flat_start else 0
    assert len(losses) == SETTINGS.steps + flat
    assert all(torch.equal(value, before[key]) for key, value in checkpoint.state_dict().items())
    quantizers = [module for module in run.last.modules() if isinstance(module, LSQQuantizer)]
    assert {quantizer.bits for quantizer in quantizers} == {3, 8}
    assert run.selected_step in (2, 4, 6)


def test_the_methods_are_what_they_are_called() -> None:
    model = small_network()
    plain = study.build_optimizer(model, study.METHODS["lsq"], SETTINGS)
    assert type(plain) is torch.optim.Adam
    for name in ("lsq+sagm", "gaqat", "gaqat-flat"):
        assert isinstance(study.build_optimizer(model, study.METHODS[name], SETTINGS), GAQATOptimizer)


def test_methods_see_the_same_batches() -> None:
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
    assert len(seen[0]) == SETTINGS.steps
    assert all(torch.equal(first, second) for first, second in zip(*seen, strict=True))


def test_the_best_validated_state_is_kept_and_later_steps_do_not_touch_it() -> None:
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


def test_recording_both_gradients_changes_nothing(tmp_path: Path) -> None:
    plain = trainer().quantized(small_network(), study.METHODS["gaqat"]).last
    recorder = conflict.ConflictRecorder()
    recorded = trainer().quantized(small_network(), study.METHODS["gaqat"], step=recorder.step).last
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), recorded.parameters(), strict=True))

    scales = len(recorder.names)
    assert scales == 6  # two quantizers in each of three layers
    for rows in (recorder.task, recorder.smooth, recorder.frozen, recorder.disorder_task, recorder.disorder_smooth):
        assert [row.shape for row in rows] == [(scales,)] * SETTINGS.steps
    assert any((first != second).any() for first, second in zip(recorder.task, recorder.smooth, strict=True))
    assert not any(row.any() for row in recorder.frozen[: SETTINGS.window])  # nothing is frozen in the first window
    assert len(set(recorder.most_conflicting(3))) == 3
    conflict.save_conflict_plot(recorder, tmp_path / "conflict.png", threshold=SETTINGS.threshold)
    assert (tmp_path / "conflict.png").read_bytes().startswith(b"\x89PNG")


def test_the_recorded_gradients_are_those_of_the_two_passes() -> None:
    model = small_network()
    settings = replace(SETTINGS, rho=0.0, alpha=0.0)  # no perturbation: both passes are the same
    recorder = conflict.ConflictRecorder()
    run = trainer()
    study.Trainer(settings, run.stream, run.validate).quantized(model, study.METHODS["gaqat"], step=recorder.step)
    for task, smooth in zip(recorder.task, recorder.smooth, strict=True):
        assert task.tolist() == smooth.tolist()
        assert task.any()


def test_recording_needs_two_passes() -> None:
    with pytest.raises(TypeError, match="two passes of a GAQATOptimizer, not Adam"):
        trainer().quantized(small_network(), study.METHODS["lsq"], step=conflict.ConflictRecorder().step)


def test_every_ambiguity_of_settings_is_passed_to_the_quantization() -> None:
    config = replace(SETTINGS, bits=5).quantization()
    assert (config.weight_bits, config.activation_bits) == (5, 5)
    assert (config.weight_granularity, config.first_last_bits) == ("tensor", 8)

"""Accelerate: the closure form and the explicit form, accumulation, clipping, checkpoints, mixed precision."""

import functools
import warnings

import pytest
import torch
from torch.nn import functional as F

from integrations import loops


@pytest.fixture
def accelerate(torchvision, fresh_accelerate):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its imports are not ours to judge
        import accelerate
    return accelerate


class Training:
    """A model, its optimizer and its scheduler under Accelerate, and the two loops."""

    def __init__(self, accelerate, **options):
        self.accelerator = accelerate.Accelerator(cpu=True, **options)
        self.net = loops.network().train()
        self.forwards = loops.count_forwards(self.net)
        self.gaqat = loops.two_pass(self.net)
        parts = self.net, self.gaqat, loops.loader(), loops.schedule(self.gaqat)
        self.model, self.optimizer, self.loader, self.scheduler = self.accelerator.prepare(*parts)

    @property
    def result(self):
        return self.net, self.gaqat

    def backward(self, batch):
        x, y = batch
        self.accelerator.backward(F.cross_entropy(self.model(x), y))

    def closures(self):
        for batch in self.loader:

            def closure(batch=batch):
                self.optimizer.zero_grad()
                self.backward(batch)

            self.optimizer.step(closure)
            self.scheduler.step()

    def explicit(self, clip=None):
        batches = []
        for batch in self.loader:
            batches.append(batch)
            with self.accelerator.accumulate(self.model):
                self.backward(batch)
                if self.accelerator.sync_gradients:
                    with self.optimizer.optimizer.perturbed():  # Accelerate's wrapper has no perturbed()
                        for again in batches:
                            self.backward(again)
                    if clip is not None:
                        self.accelerator.clip_grad_norm_(self.model.parameters(), clip)
                    batches.clear()
                self.optimizer.step()
                self.scheduler.step()
                self.optimizer.zero_grad()


def test_the_closure_form_is_the_plain_loop(accelerate):
    training = Training(accelerate)
    training.closures()
    loops.assert_same(training.result, loops.plain_loop(loops.steps(loops.loader())))
    assert len(training.forwards) == 2 * 8


@pytest.mark.parametrize("micro_batches", [1, 2, 3])
def test_the_explicit_form_with_accumulation_is_the_plain_loop(accelerate, micro_batches):
    # 3: of eight batches, the last step has two, which Accelerate divides by three all the same.
    training = Training(accelerate, gradient_accumulation_steps=micro_batches)
    training.explicit(clip=0.5)
    groups = loops.steps(loops.loader(), micro_batches)
    expected = loops.plain_loop(groups, clip=0.5, divisor=micro_batches)
    loops.assert_same(training.result, expected)
    assert len(training.forwards) == 2 * 8


def test_bf16_is_the_plain_loop_under_autocast(accelerate):
    training = Training(accelerate, mixed_precision="bf16")
    training.explicit()

    # Accelerate's autocast ends with the model, whose output it converts to fp32: so does a loss in fp32.
    autocast = functools.partial(torch.autocast, "cpu", torch.bfloat16)
    loops.assert_same(training.result, loops.plain_loop(loops.steps(loops.loader()), autocast=autocast))


def test_a_loaded_state_continues_as_if_uninterrupted(accelerate, tmp_path):
    uninterrupted = Training(accelerate)
    uninterrupted.closures()
    uninterrupted.accelerator.save_state(tmp_path / "state")
    uninterrupted.closures()

    resumed = Training(accelerate)
    resumed.accelerator.load_state(tmp_path / "state")
    resumed.closures()
    loops.assert_same(resumed.result, uninterrupted.result)


def test_a_closure_under_accumulate_is_not_called_for_most_batches(accelerate):
    # Not what one wants: AcceleratedOptimizer.step returns at once. The page on frameworks says so.
    training = Training(accelerate, gradient_accumulation_steps=2)
    for batch in training.loader:
        with training.accelerator.accumulate(training.model):
            training.optimizer.step(lambda batch=batch: training.backward(batch))
            training.optimizer.zero_grad()
    assert len(training.forwards) == 2 * 4

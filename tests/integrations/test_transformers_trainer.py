"""The Hugging Face Trainer with the adapter: accumulation, clipping, precision, interval, checkpoints."""

import functools
import subprocess
import sys
import warnings
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from gaqat_optim import QuantConfig, quantize_model
from gaqat_optim.integrations import TwoPassTrainerMixin
from integrations import loops

SAMPLES = 48


@pytest.fixture
def transformers(torchvision, fresh_accelerate):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its imports, torchao's among them, are not ours to judge
        pytest.importorskip("transformers", reason="transformers is not installed: the extra [integrations]")
        import transformers
        from transformers import ResNetForImageClassification, Trainer, ViTForImageClassification  # noqa: F401 (lazy)
    return transformers


def resnet(transformers):
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic", num_labels=2
    )
    return transformers.ResNetForImageClassification(config)


def vit(transformers):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.ViTConfig(**sizes, image_size=8, patch_size=4, num_labels=2)
    return transformers.ViTForImageClassification(config)


def network(transformers, make=resnet):
    torch.manual_seed(0)
    return quantize_model(make(transformers), QuantConfig(4, 4), calibration=torch.randn(16, 3, 8, 8))


def dataset():
    images = torch.randn(SAMPLES, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return [{"pixel_values": image, "labels": int(image.mean() > 0)} for image in images]


@pytest.fixture
def trainer(transformers, tmp_path):
    class Trainer(TwoPassTrainerMixin, transformers.Trainer):
        pass

    def build(kind=Trainer, optimizer=None, make=resnet, **arguments):
        model = network(transformers, make)
        quiet = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "logging_steps": 1, "save_strategy": "no"}
        data = {"train_sampling_strategy": "sequential", "per_device_train_batch_size": 8, "num_train_epochs": 1}
        options = {**quiet, **data, "output_dir": tmp_path / "out", **arguments}
        optimizer = loops.two_pass(model) if optimizer is None else optimizer(model)
        optimizers = optimizer, loops.schedule(optimizer)
        args = transformers.TrainingArguments(**options)
        return kind(model=model, args=args, train_dataset=dataset(), optimizers=optimizers)

    return build


def result(trainer):
    return trainer.model, trainer.optimizer.optimizer


def plain_loop(transformers, micro_batches=1, *, epochs=1, clip=1.0, autocast=nullcontext, make=resnet, **options):
    """As in :mod:`loops`, with a loss that the model computes: the mean over all samples of a step."""
    model = network(transformers, make).train()
    forwards = loops.count_forwards(model)
    optimizer = loops.two_pass(model, **options)
    scheduler = loops.schedule(optimizer)
    losses = []

    def backward(group):
        samples = torch.tensor(sum(len(batch["labels"]) for batch in group))
        total = 0.0
        for batch in group:
            with autocast():
                loss = model(**batch, num_items_in_batch=samples).loss
            loss.backward()
            total += loss.item()
        return total

    batches = list(torch.utils.data.DataLoader(dataset(), batch_size=8))
    for group in epochs * loops.steps(batches, micro_batches):
        optimizer.zero_grad()
        losses.append(backward(group))
        if optimizer.perturbs:
            with optimizer.perturbed():
                backward(group)
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        scheduler.step()
    return (model, optimizer), losses, len(forwards)


@pytest.mark.cover("values")
@pytest.mark.parametrize("make", [resnet, vit])
@pytest.mark.parametrize("micro_batches", [1, 2, 4])  # 4: of six batches, the last step has two
def test_the_trainer_is_the_plain_loop(transformers, trainer, micro_batches, make):
    t = trainer(make=make, gradient_accumulation_steps=micro_batches, max_grad_norm=0.5, num_train_epochs=2)
    forwards = loops.count_forwards(t.model)
    t.train()
    expected, losses, count = plain_loop(transformers, micro_batches, epochs=2, clip=0.5, make=make)
    loops.assert_same(result(t), expected)
    assert len(forwards) == count == 2 * 12
    assert t.state.global_step == len(losses)
    assert [float(line["loss"]) for line in t.state.log_history[:-1]] == pytest.approx(losses, rel=1e-4)


def test_bf16_is_the_plain_loop_under_autocast(transformers, trainer):
    t = trainer(bf16=True, gradient_accumulation_steps=2)
    t.train()
    autocast = functools.partial(torch.autocast, "cpu", torch.bfloat16)
    loops.assert_same(result(t), plain_loop(transformers, 2, autocast=autocast)[0])


def test_the_interval_is_respected(transformers, trainer):
    t = trainer(optimizer=functools.partial(loops.two_pass, interval=2))
    forwards = loops.count_forwards(t.model)
    t.train()
    loops.assert_same(result(t), plain_loop(transformers, interval=2)[0])
    assert len(forwards) == 6 + 3


@pytest.mark.parametrize("make", [resnet, vit])
def test_a_resumed_training_is_an_uninterrupted_one(transformers, trainer, tmp_path, make):
    options = {"make": make, "gradient_accumulation_steps": 2, "num_train_epochs": 2}
    uninterrupted = trainer(save_strategy="steps", save_steps=2, **options)  # in the middle of an epoch of three steps
    # transformers 5 saves a ViT under its old names, but the Trainer loads names as they are: quantized or not, the
    # encoder would start anew.
    model = uninterrupted.model
    model.save_pretrained = functools.partial(model.save_pretrained, save_original_format=False)
    uninterrupted.train()
    resumed = trainer(**options)
    forwards = loops.count_forwards(resumed.model)
    resumed.train(resume_from_checkpoint=tmp_path / "out" / "checkpoint-2")
    loops.assert_same(result(resumed), result(uninterrupted))
    assert len(forwards) == 2 * 2 * 4


def test_the_trainers_own_scheduler(transformers, trainer):
    t = trainer(lr_scheduler_type="linear")
    t.lr_scheduler = None
    t.train()
    assert t.optimizer.param_groups[0]["lr"] == 0.0


def test_without_the_adapter_the_trainer_makes_one_pass(transformers, trainer):
    t = trainer(kind=transformers.Trainer)
    forwards = loops.count_forwards(t.model)
    t.train()
    assert len(forwards) == 6


def test_another_optimizer_is_refused(trainer):
    t = trainer(optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(TypeError, match="optimizers="):
        t.train()


class StubTrainer:
    """What the adapter needs of a Trainer: for a scaler and for several ranks, which a Trainer on a CPU has not."""

    def __init__(self, optimizer, scale):
        self.optimizer = optimizer
        self.synced = []
        self.syncing = True
        scaler = None if scale is None else SimpleNamespace(get_scale=lambda: scale)
        self.scale = scale or 1.0
        self.accelerator = SimpleNamespace(sync_gradients=False, scaler=scaler, no_sync=self.no_sync)

    @contextmanager
    def no_sync(self, model):
        self.syncing = False
        yield
        self.syncing = True

    def get_batch_samples(self, batches):
        return batches, len(batches)

    def training_step(self, model, inputs, num_items):
        self.synced.append(self.syncing)
        x, y = inputs
        loss = nn.functional.cross_entropy(model(x), y) / num_items
        (self.scale * loss).backward()
        return loss.detach()


@pytest.mark.parametrize("scale", [None, 1024.0])
def test_the_second_pass_knows_the_scaler_and_the_ranks(scale):
    class Trainer(TwoPassTrainerMixin, StubTrainer):
        pass

    model = loops.network().train()
    optimizer = loops.two_pass(model)
    trainer = Trainer(optimizer, scale)
    batches, num_items = trainer.get_batch_samples(list(loops.loader(24)))
    for i, batch in enumerate(batches):
        trainer.accelerator.sync_gradients = i == 2
        trainer.training_step(model, batch, num_items)
    assert trainer.synced == [True, True, True, False, False, True]
    for p in model.parameters():
        p.grad /= trainer.scale
    optimizer.step()
    loops.assert_same((model,), (loops.plain_loop(loops.steps(loops.loader(24), 3))[0],))


def test_importing_the_adapter_imports_no_framework():
    program = (
        "import sys, gaqat_optim.integrations; print(*{'transformers', 'accelerate', 'lightning'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.split() == []

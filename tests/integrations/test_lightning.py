"""Lightning: automatic and manual optimization, checkpoints, clipping, accumulation, mixed precision."""

import functools
import warnings

import pytest
import torch
from torch.nn import functional as F

from integrations import loops

pytestmark = [
    # Lightning's own code: it reads torch's tree specs in a way that torch deprecates.
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    # A data loader without workers is what a test wants.
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers:UserWarning"),
]


@pytest.fixture(scope="module")
def pl(torchvision):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its imports are not ours to judge
        pytest.importorskip("lightning", reason="lightning is not installed: the extra [integrations]")
        import lightning.pytorch
    return lightning.pytorch


@pytest.fixture
def trainer(pl, tmp_path):
    def build(**options):
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        quiet |= {"enable_checkpointing": False, "default_root_dir": tmp_path, "accelerator": "cpu", "devices": 1}
        return pl.Trainer(**{"max_epochs": 1, **quiet, **options})

    return build


@pytest.fixture
def automatic(pl):
    class Automatic(pl.LightningModule):
        def __init__(self, clip=None):
            super().__init__()
            self.net = loops.network()
            self.clip = clip

        def training_step(self, batch, _):
            x, y = batch
            return F.cross_entropy(self.net(x), y)

        def configure_optimizers(self):
            optimizer = loops.two_pass(self.net)
            if self.clip is not None:
                loops.clip_in_every_step(optimizer, self.clip)
            scheduler = {"scheduler": loops.schedule(optimizer), "interval": "step"}
            return {"optimizer": optimizer, "lr_scheduler": scheduler}

    return Automatic


def fitted(trainer, module, **fit):
    """The trainer after fit, and what is compared with the plain loop."""
    trainer.fit(module, loops.loader(), **fit)
    return trainer, (module.net, trainer.optimizers[0])


def test_automatic_optimization_is_the_plain_loop(trainer, automatic):
    module = automatic()
    forwards = loops.count_forwards(module.net)
    t, result = fitted(trainer(max_epochs=2), module)
    loops.assert_same(result, loops.plain_loop(2 * loops.steps(loops.loader())))
    assert t.global_step == 16
    assert len(forwards) == 2 * 16
    assert module.net[1].num_batches_tracked == 16
    assert any(record.frozen > 0 for record in result[1].scale_report())


def test_a_resumed_fit_is_an_uninterrupted_one(trainer, automatic, tmp_path):
    first, _ = fitted(trainer(max_epochs=1), automatic())
    first.save_checkpoint(tmp_path / "epoch.ckpt")
    resumed, result = fitted(trainer(max_epochs=3), automatic(), ckpt_path=tmp_path / "epoch.ckpt", weights_only=True)
    assert resumed.global_step == 24
    loops.assert_same(result, fitted(trainer(max_epochs=3), automatic())[1])


def test_the_trainers_clipping_clips_each_pass(trainer, automatic):
    _, result = fitted(trainer(gradient_clip_val=0.05), automatic())
    loops.assert_same(result, loops.plain_loop(loops.steps(loops.loader()), clip_each=0.05))


def test_a_hook_of_the_base_clips_the_combined_gradient(trainer, automatic):
    _, result = fitted(trainer(), automatic(clip=0.05))
    expected = loops.plain_loop(loops.steps(loops.loader()), clip=0.05)
    loops.assert_same(result, expected)
    assert loops.differ(result[0], loops.plain_loop(loops.steps(loops.loader()), clip_each=0.05)[0])


def test_bf16_mixed_is_the_plain_loop_under_autocast(trainer, automatic):
    _, result = fitted(trainer(precision="bf16-mixed"), automatic())
    autocast = functools.partial(torch.autocast, "cpu", torch.bfloat16, cache_enabled=False)
    loops.assert_same(result, loops.plain_loop(loops.steps(loops.loader()), autocast=autocast))


@pytest.mark.parametrize("options", [{}, {"gradient_clip_val": 0.05}, {"precision": "bf16-mixed"}], ids=str)
def test_automatic_accumulation_is_refused(trainer, automatic, options):
    # Lightning's closure knows the last micro-batch alone, and so would the second pass.
    module = automatic()
    with pytest.raises(RuntimeError, match=r"does not clear them(.|\n)*in its manual optimization"):
        trainer(accumulate_grad_batches=2, **options).fit(module, loops.loader())
    assert module.trainer.global_step == 0


def test_automatic_optimization_with_a_grad_scaler_makes_one_pass(pl, trainer, automatic):
    # Lightning calls the closure itself then, and step() without one.
    module = automatic()
    forwards = loops.count_forwards(module.net)
    plugin = pl.plugins.MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))
    fitted(trainer(plugins=plugin), module)
    assert len(forwards) == 8


@pytest.fixture
def manual(automatic):
    class Manual(automatic):
        automatic_optimization = False
        micro_batches = 2

        def __init__(self):
            super().__init__()
            self.batches = []

        def backward_all(self):
            for x, y in self.batches:
                self.manual_backward(F.cross_entropy(self.net(x), y) / len(self.batches))

        def training_step(self, batch, _):
            self.batches.append(batch)
            if len(self.batches) == self.micro_batches:
                self.step()
                self.lr_schedulers().step()
                self.batches.clear()

        def step(self):
            optimizer = self.optimizers()

            def closure():
                optimizer.zero_grad()
                self.backward_all()

            optimizer.step(closure)

    return Manual


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_manual_optimization_with_a_closure_is_the_plain_loop(trainer, manual, micro_batches):
    module = manual()
    module.micro_batches = micro_batches
    forwards = loops.count_forwards(module.net)
    t, result = fitted(trainer(), module)
    loops.assert_same(result, loops.plain_loop(loops.steps(loops.loader(), micro_batches)))
    assert (t.global_step, len(forwards)) == (8 // micro_batches, 2 * 8)


@pytest.fixture
def explicit(manual):
    class Explicit(manual):
        def step(self):
            wrapper = self.optimizers()
            optimizer = wrapper.optimizer  # what perturbed() keeps does not belong in Lightning's wrapper
            scaler = getattr(self.trainer.precision_plugin, "scaler", None)
            optimizer.zero_grad()
            self.backward_all()
            with optimizer.perturbed(grad_scale=1.0 if scaler is None else scaler.get_scale()):
                self.backward_all()
            wrapper.step()  # in full precision, Lightning hands on a closure that does nothing

    return Explicit


def test_manual_optimization_in_the_explicit_form_is_the_plain_loop(trainer, explicit):
    t, result = fitted(trainer(), explicit())
    loops.assert_same(result, loops.plain_loop(loops.steps(loops.loader(), 2)))
    assert t.global_step == 4


def test_manual_optimization_with_a_grad_scaler_is_the_plain_loop(pl, trainer, explicit):
    def scaler():
        return torch.amp.GradScaler("cpu", init_scale=2.0**10)

    plugin = pl.plugins.MixedPrecision("16-mixed", "cpu", scaler=scaler())
    t, result = fitted(trainer(plugins=plugin), explicit())
    autocast = functools.partial(torch.autocast, "cpu", torch.float16, cache_enabled=False)
    loops.assert_same(result, loops.plain_loop(loops.steps(loops.loader(), 2), autocast=autocast, scaler=scaler()))
    assert t.global_step == 4


def test_what_is_logged_in_both_passes_comes_from_both(trainer, automatic):
    class Logging(automatic):
        def training_step(self, batch, index):
            loss = super().training_step(batch, index)
            self.log("loss", loss, on_step=True, on_epoch=True)
            self.losses = [*getattr(self, "losses", []), loss.item()]
            return loss

    module = Logging()
    t, _ = fitted(trainer(), module)
    assert t.callback_metrics["loss_step"].item() == pytest.approx(module.losses[-1], abs=0)
    assert t.callback_metrics["loss_epoch"].item() == pytest.approx(sum(module.losses) / 16, rel=1e-5)

"""What users of other sharpness-aware optimizers reported, one test each: here it does not happen.

The numbers are those of the list in our research notes; repository and issue stand beside each. Every scenario runs
on our optimizer, and on the usual implementation (tests/naive_sam.py), which has to fail it in the way that is stated:
a scenario that it passed would show nothing.
"""

import copy
import datetime
import gc
import io
import warnings
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from gaqat_optim import SAM, GAQATOptimizer
from naive_sam import NaiveSAM

RHO = 0.1


class Ours:
    """The protocol of GAQATOptimizer, as far as scenarios need one in common with the naive one."""

    @staticmethod
    def build(model, base_class=torch.optim.SGD, params=None, interval=1, **arguments):
        base = base_class(list(model.parameters()) if params is None else params, **arguments)
        return GAQATOptimizer(base, model, perturbation=SAM(RHO), interval=interval)

    @staticmethod
    def two_passes(optimizer, backward, grad_scale=1.0):
        """Both passes, up to the place where a loop clips gradients and calls step()."""
        backward()
        if optimizer.perturbs:
            with optimizer.perturbed(grad_scale=grad_scale):
                backward()

    @staticmethod
    def finish(optimizer):
        optimizer.step()


class Naive:
    @staticmethod
    def build(model, base_class=torch.optim.SGD, params=None, interval=1, **arguments):
        params = list(model.parameters()) if params is None else params
        return NaiveSAM(params, base_class, rho=RHO, interval=interval, **arguments)

    @staticmethod
    def two_passes(optimizer, backward, grad_scale=1.0):
        backward()
        optimizer.first_step(zero_grad=True)
        backward()

    @staticmethod
    def finish(optimizer):
        optimizer.second_step()


@contextmanager
def expected(kind, error, words=None):
    """The scenario passes with ours, and with the naive one fails in this way."""
    if kind is Ours:
        yield
    else:
        with pytest.raises(error, match=words):
            yield


both = pytest.mark.parametrize("kind", [Ours, Naive])


def network(dtype=torch.float32):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def data(count=12):
    generator = torch.Generator().manual_seed(2)
    x, y = torch.randn(count, 6, generator=generator), torch.randint(3, (count,), generator=generator)
    return x, y


X, Y = data()


def backward_of(model, x=X, y=Y):
    def backward():
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    return backward


def step(kind, optimizer, backward):
    optimizer.zero_grad()
    kind.two_passes(optimizer, backward)
    kind.finish(optimizer)


def values(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(model, before):
    return all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def by_hand(model, steps, backward, lr=0.1, momentum=0.0):
    """SAM over SGD, straight from its equations, on the parameters of ``model``."""
    velocity = [torch.zeros_like(p) for p in model.parameters()]
    for _ in range(steps):
        model.zero_grad()
        backward()
        theta = [p.detach().clone() for p in model.parameters()]
        norm = torch.cat([p.grad.reshape(-1) for p in model.parameters()]).norm()
        with torch.no_grad():
            for p in model.parameters():
                p += RHO * p.grad / norm
        model.zero_grad()
        backward()
        with torch.no_grad():
            for p, start, v in zip(model.parameters(), theta, velocity, strict=True):
                v.mul_(momentum).add_(p.grad)
                p.copy_(start - lr * v)


def assert_close(model, other):
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)  # float32, a few steps, sums in another order


def test_the_naive_implementation_is_sam_where_nothing_goes_wrong():
    """Otherwise its failures below would say nothing."""
    model, reference = network(), network()
    optimizer = Naive.build(model, lr=0.1, momentum=0.9)
    for _ in range(5):
        step(Naive, optimizer, backward_of(model))
    by_hand(reference, 5, backward_of(reference), momentum=0.9)
    assert_close(model, reference)


@both
@pytest.mark.parametrize("overflow", [False, True])
def test_pain_01_amp_grad_scaler(kind, overflow):
    """davda54/sam 7, 11, 55, 79, 97; nblt/F-SAM 5; juntang-zhuang/GSAM 2: GradScaler decides whether step() runs.

    The naive one has no step() that a scaler could call; where it is skipped, weights stay displaced.
    """
    model, reference = network(), network()
    optimizer = kind.build(model, lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    calls = []

    def scaled():
        scaler.scale(F.cross_entropy(model(X), Y)).backward()
        calls.append(1)
        if overflow and len(calls) == 2:
            model[0].weight.grad[0, 0] = torch.inf

    with expected(kind, AssertionError, "not close" if overflow else "requires closure"):
        kind.two_passes(optimizer, scaled, grad_scale=scaler.get_scale())
        scaler.step(optimizer)
        scaler.update()
        by_hand(reference, 0 if overflow else 1, backward_of(reference))
        assert_close(model, reference)
        assert scaler.get_scale() == 2.0 ** (9 if overflow else 10)


@both
def test_pain_02_checkpoint_and_resume_loses_momentum(kind):
    """davda54/sam 34, 73; kozistr/pytorch_optimizer 332: the naive state dict holds the displacement, no momentum."""
    model = network()
    optimizer = kind.build(model, lr=0.1, momentum=0.9)
    for _ in range(4):
        step(kind, optimizer, backward_of(model))
    resumed = copy.deepcopy(model)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    again = kind.build(resumed, lr=0.1, momentum=0.9)
    again.load_state_dict(torch.load(file, weights_only=True))
    with expected(kind, AssertionError):
        for _ in range(2):
            step(kind, optimizer, backward_of(model))
            step(kind, again, backward_of(resumed))
        assert same(resumed, values(model))


@both
def test_pain_03_gradient_accumulation_in_a_closure(kind):
    """davda54/sam 3, 62 ("not possible with this implementation"), 94; nblt/F-SAM 3.

    The naive step() takes the caller's gradients for the first ones: there are none.
    """
    model, reference = network(), network()
    optimizer = kind.build(model, lr=0.1)

    def closure():
        optimizer.zero_grad()
        losses = [F.cross_entropy(model(x), y) / 3 for x, y in zip(X.split(4), Y.split(4), strict=True)]
        for loss in losses:
            loss.backward()
        return sum(losses)

    by_hand(reference, 3, backward_of(reference))
    with expected(kind, RuntimeError, "non-empty"):
        for _ in range(3):
            optimizer.step(closure)
        assert_close(model, reference)


@both
def test_pain_03_gradient_accumulation_in_cheap_steps(kind):
    """davda54/sam 94; kozistr's LookSAM: in steps without a second pass, the naive one adds both passes' gradients."""
    model, reference = network(), network()
    optimizer = kind.build(model, lr=0.1, interval=2)

    def accumulate():
        for x, y in zip(X.split(4), Y.split(4), strict=True):
            (F.cross_entropy(model(x), y) / 3).backward()

    step(kind, optimizer, accumulate)
    by_hand(reference, 1, backward_of(reference))
    assert_close(model, reference)
    step(kind, optimizer, accumulate)
    reference.zero_grad()
    backward_of(reference)()
    torch.optim.SGD(reference.parameters(), lr=0.1).step()
    with expected(kind, AssertionError):
        assert_close(model, reference)


@both
def test_pain_04_step_requires_a_closure(kind):
    """davda54/sam 8, 66; kozistr 64; romilbert/samformer 14: every torch optimizer can do without."""
    model, reference = network(), network()
    optimizer = kind.build(model, lr=0.1)
    plain = torch.optim.SGD(reference.parameters(), lr=0.1)
    with expected(kind, AssertionError, "requires closure"):
        for m, o in ((model, optimizer), (reference, plain)):
            o.zero_grad()
            backward_of(m)()
            o.step()
        assert same(model, values(reference))


def ddp_worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2,
        timeout=datetime.timedelta(seconds=60),
    )  # fmt: skip
    results = {}
    for kind in (Ours, Naive):
        model = network()
        parallel = DistributedDataParallel(model)
        optimizer = kind.build(parallel, lr=0.1)
        x, y = X.chunk(2)[rank], Y.chunk(2)[rank]
        for _ in range(8):
            optimizer.zero_grad()
            # Each rank is displaced by the gradient of its own batch: no_sync() around forward and backward.
            with parallel.no_sync():
                backward_of(parallel, x, y)()
            if kind is Ours:
                with optimizer.perturbed(per_rank=True):
                    backward_of(parallel, x, y)()
                optimizer.step()
            else:
                optimizer.first_step(zero_grad=True)
                backward_of(parallel, x, y)()
                optimizer.second_step()
        results[kind.__name__] = model.state_dict()
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pains")
    mp.spawn(ddp_worker, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@both
def test_pain_05_distributed_data_parallel_and_no_sync(kind, ranks):
    """davda54/sam 18, 38, 78, 94: ranks displaced each its own way must be the same again after it.

    The naive one subtracts what it added, which rounds differently on each rank: replicas drift apart.
    """
    one, two = (rank[kind.__name__] for rank in ranks)
    with expected(kind, AssertionError):
        assert all(torch.equal(one[name], two[name]) for name in one)


@both
def test_pain_06_batchnorm_counts_the_second_pass(kind):
    """davda54/sam 17, 30, 44: the naive one leaves that to the user, and statistics mix with displaced ones."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    once = copy.deepcopy(model)
    optimizer = kind.build(model, lr=0.1)
    step(kind, optimizer, backward_of(model))
    once(X)
    with expected(kind, AssertionError):
        for name, buffer in once.named_buffers():
            assert torch.equal(dict(model.named_buffers())[name], buffer)


@both
def test_pain_07_learning_rate_scheduler_warns_for_nothing(kind):
    """davda54/sam 28; apex 978: two calls of one's own are no step() that a scheduler could have seen."""
    model = network()
    optimizer = kind.build(model, lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    step(kind, optimizer, backward_of(model))
    with expected(kind, UserWarning, r"lr_scheduler.step\(\)` before `optimizer.step"), warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler.step()
        assert optimizer.param_groups[0]["lr"] == 0.05


@both
def test_pain_07_learning_rate_scheduler_after_loading_has_no_effect(kind):
    """SRSGD 1; davda54/sam 28: on which object? The naive groups are the base's only until a checkpoint is loaded."""
    model = network()
    optimizer = kind.build(model, lr=0.1)
    step(kind, optimizer, backward_of(model))
    optimizer.load_state_dict(optimizer.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pain 7's other half
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.0)
    before = values(model)
    with expected(kind, AssertionError):
        step(kind, optimizer, backward_of(model))
        torch.testing.assert_close(values(model), before, rtol=0, atol=1e-6)


@both
def test_pain_08_gradient_clipping_where(kind):
    """davda54/sam 32, 64, 97: where every loop clips, right before the step.

    Clipping relative to the size of weights (as for normalizer-free networks) shows what is in place there: the naive
    weights are still displaced.
    """
    model = network()
    optimizer = kind.build(model, lr=0.1)
    before = values(model)
    kind.two_passes(optimizer, backward_of(model))
    with expected(kind, AssertionError, "displaced"):
        for name, p in model.named_parameters():
            assert torch.equal(p, before[name]), "displaced"
            p.grad.mul_((0.01 * p.norm() / p.grad.norm()).clamp(max=1.0).detach())
        kind.finish(optimizer)
        for name, p in model.named_parameters():
            assert 0 < (p - before[name]).norm() < 0.00101 * before[name].norm()


@both
@pytest.mark.parametrize("used", ["first", "second"])
def test_pain_09_parameter_without_gradient_in_one_pass(kind, used):
    """davda54/sam 2, 51: KeyError; and one that only the first pass used stays displaced, for ever."""
    model = nn.ModuleDict({name: nn.Linear(6, 1) for name in ("always", "branch")})
    optimizer = kind.build(model, lr=0.0)
    before = values(model)
    passes = []

    def backward():
        passes.append(1)
        y = model["always"](X)
        if len(passes) == (1 if used == "first" else 2):
            y = y + model["branch"](X)
        y.square().mean().backward()

    with expected(kind, AssertionError if used == "first" else KeyError):
        step(kind, optimizer, backward)
        torch.testing.assert_close(values(model), before, rtol=0, atol=1e-6)
        assert model["branch"].weight.grad.any()  # what it had is what the base got


@both
def test_pain_10_accelerate_takes_it_for_an_optimizer(kind):
    """kohya-ss/sd-scripts PR 1605: what Accelerate does to whatever it takes for an optimizer, before any step.

    It asks for the type, moves the state by a round trip, reads and writes groups: the naive base sees none of it.
    """
    model = network()
    optimizer = kind.build(model, torch.optim.Adam, lr=0.1)
    assert isinstance(optimizer, torch.optim.Optimizer)
    optimizer.load_state_dict(optimizer.state_dict())
    step(kind, optimizer, backward_of(model))  # KeyError 'exp_avg' where the state was not empty
    optimizer.param_groups[0]["lr"] = 0.0
    before = values(model)
    with expected(kind, AssertionError):
        step(kind, optimizer, backward_of(model))
        torch.testing.assert_close(values(model), before, rtol=0, atol=1e-6)


class Trainer:
    """A training framework in small: it knows torch.optim.Optimizer and nothing of two passes."""

    def __init__(self, model, optimizer, schedule):
        assert isinstance(optimizer, torch.optim.Optimizer)
        self.model, self.optimizer = model, optimizer
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)

    def closure(self):
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.model(X), Y)
        loss.backward()
        return loss

    def fit(self, steps):
        losses = []
        for _ in range(steps):
            with torch.no_grad():  # around all that is not the closure's; step() turns it on again, as torch's do
                losses.append(self.optimizer.step(closure=self.closure).item())
            self.scheduler.step()
        return losses


@both
def test_pain_11_training_frameworks(kind):
    """davda54/sam 31; Lightning 17650; mmcv 2190; mmdetection 4747; skorch 785: step(closure) has to be all of it."""
    model, reference = network(), network()
    losses_by_hand = []

    def schedule(count):
        return 0.5**count

    trainer = Trainer(model, kind.build(model, lr=0.1), schedule)
    for count in range(4):
        losses_by_hand.append(F.cross_entropy(reference(X), Y).item())
        by_hand(reference, 1, backward_of(reference), lr=0.1 * schedule(count))
    with expected(kind, RuntimeError, "non-empty"):
        assert trainer.fit(4) == pytest.approx(losses_by_hand, rel=1e-5)
        assert_close(model, reference)


@both
def test_pain_12_add_param_group_gets_the_base_s_defaults(kind):
    """davda54/sam PR 65: the naive wrapper fills in its own defaults, and the base misses its learning rate."""
    model, reference = network(), network()
    model[2].requires_grad_(False)  # as one begins to thaw a network
    optimizer = kind.build(model, params=list(model[0].parameters()), lr=0.1, momentum=0.9)
    model[2].requires_grad_(True)
    optimizer.add_param_group({"params": list(model[2].parameters())})
    by_hand(reference, 3, backward_of(reference), momentum=0.9)
    with expected(kind, KeyError):
        for _ in range(3):
            step(kind, optimizer, backward_of(model))
        assert_close(model, reference)


@both
@pytest.mark.parametrize("gradient", [0.0, torch.nan, torch.inf])
def test_pain_13_nan_from_zero_norms_and_half_precision(kind, gradient):
    """rollovd/LookSAM 1; davda54/sam 7: in float16, 1e-12 is zero too, and what is not finite never leaves again."""
    model = nn.Linear(6, 1, bias=False).to(torch.float16)
    optimizer = kind.build(model, lr=0.1)
    before = values(model)
    passes = []

    def backward():
        passes.append(1)
        model.weight.grad = torch.full_like(model.weight, gradient if len(passes) == 1 else 0.0)

    with expected(kind, AssertionError):
        optimizer.zero_grad()
        kind.two_passes(optimizer, backward)
        if kind is Naive:
            kind.finish(optimizer)
        assert same(model, before)


@both
def test_pain_14_twice_the_time(kind):
    """Composer's interval; kozistr 213, 344, 424: with interval=5 a step costs 1.2 passes, in either form.

    The loop around the naive one makes both passes in every step, whatever it does with them.
    """
    model = network()
    optimizer = kind.build(model, lr=0.1, interval=5)
    forwards, backwards = [], []
    model.register_forward_hook(lambda *_: forwards.append(1))
    model[0].weight.register_hook(lambda g: backwards.append(1))
    for _ in range(10):
        step(kind, optimizer, backward_of(model))
    with expected(kind, AssertionError):
        assert len(forwards) == len(backwards) == 12
        for _ in range(10):
            optimizer.step(lambda: (optimizer.zero_grad(), backward_of(model)())[1])
        assert len(forwards) == len(backwards) == 24


@both
def test_pain_14_more_memory(kind):
    """SAM-TensorFlow 9: two tensors of a parameter's size more within the second pass, none between steps.

    The naive one keeps its displacement until the next step.
    """
    model = nn.Linear(64, 61, bias=False)  # a size that nothing else has
    x, target = torch.randn(4, 64), torch.randn(4, 61)
    optimizer = kind.build(model, lr=0.1)

    def alive():
        gc.collect()
        return len({t.data_ptr() for t in gc.get_objects() if _is_tensor_of(t, 64 * 61)})

    within = []

    def backward():
        loss = F.mse_loss(model(x), target)
        if model.weight.grad is None:
            within.append(alive())
        loss.backward()

    step(kind, optimizer, backward)
    optimizer.zero_grad()
    with expected(kind, AssertionError):
        assert within == [1, 3]  # the parameter; with its value and g_task
        assert alive() == 1


def _is_tensor_of(thing, size):
    # By exact type: isinstance would ask every proxy in the process.
    return type(thing) in (torch.Tensor, nn.Parameter) and thing.numel() == size


@pytest.fixture
def one_rank(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@both
def test_pain_15_sharded(kind, one_rank):
    """fairscale 989: a sharded model trains as a whole one does, and its sharded checkpoint can be taken and resumed.

    The naive one's state dict has no place for the moments of Adam.
    """
    model, reference = network(), network()
    for layer in (model[0], model[2], model):
        fully_shard(layer)
    optimizer = kind.build(model, torch.optim.Adam, lr=0.01)
    expectation = Ours.build(reference, torch.optim.Adam, lr=0.01)
    with expected(kind, AssertionError, "the moments are lost"):
        for _ in range(3):
            step(kind, optimizer, backward_of(model))
            step(Ours, expectation, backward_of(reference))
        saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
        assert any("exp_avg" in entry for entry in saved["state"].values()), "the moments are lost"
        fresh = kind.build(model, torch.optim.Adam, lr=0.01)
        set_optimizer_state_dict(model, fresh, saved)
        step(kind, fresh, backward_of(model))
        step(Ours, expectation, backward_of(reference))
        for p, q in zip(model.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(p.full_tensor(), q, rtol=1e-5, atol=1e-6)  # norms in another order

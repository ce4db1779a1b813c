"""torch.distributed.checkpoint: save on two ranks; go on on two, on four, and in one process."""

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from distributed.checkpoint_scenarios import AFTER, build, result, resume, state_of, uninterrupted
from distributed.processes import PERTURBATIONS, assert_close, assert_same_bits, data, quantized, train
from gaqat_optim import DisorderFreeze, GAQATOptimizer
from gaqat_optim.scale_names import is_scale_name

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),  # which one process is told
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning"),  # what torch 2.8 tells itself
]


@pytest.fixture(scope="module")
def expected():
    saved, end = uninterrupted()
    assert saved[3] == [5, 3]  # in the middle of a window of 2 perturbed steps, and the next step has one pass
    assert saved[1].any()
    assert not saved[1].all()
    return saved, end


@pytest.mark.parametrize("kind", ["dcp fsdp", "dcp ddp"])
def test_the_ranks_that_saved_go_on_to_the_bit(two, expected, kind):
    for of_rank in two[kind]:
        assert_same_bits([of_rank["saved"], of_rank["loaded"]])
        assert_same_bits([of_rank["end"], of_rank["resumed"]])
    assert_close(two[kind][0]["saved"], expected[0])
    assert_close(two[kind][0]["end"], expected[1])


@pytest.mark.parametrize("kind", ["dcp fsdp", "dcp ddp", "dcp fsdp as ddp"])
def test_twice_as_many_ranks_go_on(four, expected, kind):
    assert_same_bits(four[kind])
    assert_close(four[kind][0]["loaded"], expected[0])
    assert_close(four[kind][0]["resumed"], expected[1])


@pytest.mark.parametrize("kind", ["fsdp", "ddp"])
def test_one_process_goes_on(two, folder, expected, kind):
    model = quantized()
    optimizer = build(model)
    resume(model, optimizer, folder / kind, no_dist=True)
    assert_close(result(model, optimizer), expected[0])
    train(model, optimizer, *data(), AFTER)
    assert_close(result(model, optimizer), expected[1])


@pytest.mark.parametrize("way", ["copies", "broadcast"])
def test_a_full_state_dict_in_a_plain_file(two, way):
    for of_rank in two["dcp full"]:
        assert_same_bits([of_rank["end"], of_rank[way]])


def plain_sgd(model):
    """A base without state."""
    base = torch.optim.SGD(model.parameters(), lr=0.05)
    return GAQATOptimizer(base, model, perturbation=PERTURBATIONS["SAGM"], freezing=DisorderFreeze(2, 0.6), interval=2)


def test_a_base_without_state(tmp_path):
    model = quantized()
    optimizer = plain_sgd(model)
    train(model, optimizer, *data(), 5)
    optimizer.zero_grad()  # torch makes a step to fill a state that is empty, whenever it is asked for one
    dcp.save(state_of(model, optimizer), checkpoint_id=tmp_path, no_dist=True)
    saved = result(model, optimizer)
    assert saved[3] == [5, 3]
    resumed = quantized()
    other = plain_sgd(resumed)
    resume(resumed, other, tmp_path, no_dist=True)
    assert_same_bits([saved, result(resumed, other)])
    for m, o in ((model, optimizer), (resumed, other)):
        train(m, o, *data(), AFTER)
    assert_same_bits([result(model, optimizer), result(resumed, other)])


@pytest.mark.parametrize("make", [build, plain_sgd], ids=["adam", "sgd"])
def test_scales_that_are_not_trained_yet(make, tmp_path):
    def warm_up():
        model = quantized()
        for name, p in model.named_parameters():
            p.requires_grad_(not name.startswith("0.") or not is_scale_name(name))
        return model, make(model)

    model, optimizer = warm_up()
    train(model, optimizer, *data(), 5)
    optimizer.zero_grad()
    dcp.save(state_of(model, optimizer), checkpoint_id=tmp_path, no_dist=True)
    resumed, other = warm_up()
    resume(resumed, other, tmp_path, no_dist=True)
    assert_same_bits([result(model, optimizer), result(resumed, other)])
    for m, o in ((model, optimizer), (resumed, other)):
        m.requires_grad_(True)
        train(m, o, *data(), AFTER)
    assert_same_bits([result(model, optimizer), result(resumed, other)])


@pytest.mark.parametrize("make", [build, plain_sgd], ids=["adam", "sgd"])
def test_a_flattened_state_dict_is_refused_rather_than_loaded_in_part(make):
    model = quantized()
    optimizer = make(model)
    train(model, optimizer, *data(), 5)
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    flat = get_optimizer_state_dict(model, optimizer, options=options)
    before = result(model, optimizer)
    with pytest.raises(ValueError, match="flatten_optimizer_state_dict"):
        set_optimizer_state_dict(model, optimizer, flat, options=options)
    assert_same_bits([before, result(model, optimizer)])


def test_a_checkpoint_of_the_base_alone_goes_into_the_base():
    model = quantized()
    optimizer = build(model)
    train(model, optimizer, *data(), 3)
    state = get_optimizer_state_dict(model, optimizer.base)
    other = build(model)
    with pytest.raises(ValueError, match="no freezing state"):
        set_optimizer_state_dict(model, other, state)
    set_optimizer_state_dict(model, other.base, state)
    first = next(iter(model.parameters()))
    assert torch.equal(other.base.state[first]["exp_avg"], optimizer.base.state[first]["exp_avg"])


def test_a_step_at_rate_zero_counts_unless_it_could_be_a_checkpoint_s():
    model = quantized()
    optimizer = plain_sgd(model)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    train(model, optimizer, *data(), 2)
    assert optimizer.steps == 2
    optimizer.step()
    assert optimizer.steps == 2
    optimizer.param_groups[0]["lr"] = torch.tensor(0.1)
    optimizer.step()
    assert optimizer.steps == 3

"""Ranks that initialized from different data agree on one scale: two real processes. In training: distributed/."""

import torch

from distributed.processes import spawn
from gaqat_optim import LSQQuantizer
from gaqat_optim.quant.lsq.rank_agreement import agree_on_scales, is_distributed

# What each of two ranks has: scale and zero point, or None where it saw no data.
HAVE = {
    "larger scale": ((0.25, 0), (0.5, 0)),
    "lower codes": ((0.25, 8), (0.5, 0)),
    "one rank": (None, (0.125, 3)),
    "no rank": (None, None),
    "did not wait": ((0.25, 0), (0.5, 0)),
}


def agree(rank, ranks, folder):
    assert is_distributed()
    quantizers = {name: LSQQuantizer(4, scale_domain="linear") for name in HAVE}
    for name, states in HAVE.items():
        if states[rank] is not None:
            quantizers[name].initialize(torch.ones(1), *states[rank])
    agree_on_scales(list(quantizers.values()), [q for name, q in quantizers.items() if name != "did not wait"])
    agree_on_scales([], [])
    return {name: (q.scale.item(), q.zero_point) if q.is_initialized else None for name, q in quantizers.items()}


def test_the_lowest_codes_decide_and_then_the_largest_scale(tmp_path):
    ranks = spawn({"agree": agree}, 2, tmp_path)["agree"]
    for rank, states in enumerate(ranks):
        assert states == {
            "larger scale": (0.5, 0),
            "lower codes": (0.25, 8),
            "one rank": (0.125, 3),
            "no rank": None,
            "did not wait": HAVE["did not wait"][rank],
        }


def test_a_process_of_its_own_has_no_other_ranks():
    assert not is_distributed()

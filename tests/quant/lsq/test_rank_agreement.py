"""Ranks that initialized from different data agree on one scale: two real processes. In training: distributed/."""

import torch

from distributed.processes import spawn
from gaqat_optim import LSQQuantizer
from gaqat_optim.quant.lsq.rank_agreement import agree_on_scales, is_distributed

# The values that each of two ranks saw: None where it saw none.
SEEN = {
    "both": ([0.0, 1.0], [0.0, 4.0]),
    "negative": ([-1.0, 1.0], [0.0, 4.0]),
    "one": (None, [-2.0, 3.0]),
    "none": (None, None),
    "before": ([0.0, 1.0], [0.0, 4.0]),
}


def agree(rank, ranks, folder):
    assert is_distributed()
    quantizers = {name: LSQQuantizer(4) for name in SEEN}
    for name, values in SEEN.items():
        if values[rank] is not None:
            quantizers[name].initialize(torch.tensor(values[rank]))
    agree_on_scales(list(quantizers.values()), [q for name, q in quantizers.items() if name != "before"])
    agree_on_scales([], [])
    return {
        name: [q.scale.item(), q.zero_point if q.is_initialized else None, q.is_initialized]
        for name, q in quantizers.items()
    }


def state(values):
    quantizer = LSQQuantizer(4)
    quantizer.initialize(torch.tensor(values))
    return [quantizer.scale.item(), quantizer.zero_point, True]


def test_the_rank_with_the_lowest_codes_decides_and_then_the_largest_scale(tmp_path):
    first, second = spawn({"agree": agree}, 2, tmp_path)["agree"]
    assert first["both"] == second["both"] == state(SEEN["both"][1])
    assert first["negative"] == second["negative"] == state(SEEN["negative"][0])
    assert first["one"] == second["one"] == state(SEEN["one"][1])
    assert first["none"][2] is second["none"][2] is False
    assert (first["before"], second["before"]) == (state(SEEN["before"][0]), state(SEEN["before"][1]))


def test_a_process_of_its_own_has_no_other_ranks():
    assert not is_distributed()

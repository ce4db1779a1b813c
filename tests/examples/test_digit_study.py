"""The sources of a cell of the digit study."""

from __future__ import annotations

import torch

from domain_generalization import digit_domains, digit_study


def test_the_held_out_domain_is_in_no_part_of_the_training_data() -> None:
    domains = {
        name: digit_domains.Domain(torch.full((10, 1), float(number)), torch.full((10,), number))
        for number, name in enumerate(digit_domains.DOMAINS)
    }
    training, holdouts = digit_study.split_sources(domains, "blended", 0.2, seed=0)
    for part, size in ((training, 8), (holdouts, 2)):
        assert [(y.unique().tolist(), len(y)) for _, y in part] == [([0], size), ([1], size), ([3], size)]

"""The digits as a data set."""

from __future__ import annotations

import torch

from domain_generalization import digit_domains, digit_study
from domain_generalization.study.settings import make_settings


def test_the_held_out_domain_is_in_no_part_of_the_training_data() -> None:
    domains = {
        name: digit_domains.Domain(torch.full((10, 1), float(number)), torch.full((10,), number))
        for number, name in enumerate(digit_domains.DOMAINS)
    }
    training, holdouts = digit_study.split_sources(domains, "blended", 0.2, seed=0)
    for part, size in ((training, 8), (holdouts, 2)):
        assert [(set(source.labels), len(source)) for source in part] == [({0}, size), ({1}, size), ({3}, size)]


def test_the_held_out_domain_is_measured_clean_blurred_and_noisy() -> None:
    data = digit_study.DigitData()
    settings = make_settings("recommended", data.presets["recommended"])
    fold = data.fold("sketch", 0, settings)
    images = digit_study.load_once(0)["sketch"].images
    assert list(fold.targets) == ["clean", "blurred", "noisy"]
    assert torch.equal(fold.targets["clean"].sample(3, None)[0], images[3])
    assert not torch.equal(fold.targets["noisy"].sample(3, None)[0], images[3])
    assert (settings.steps, settings.flat_steps, settings.fp32_steps, settings.granularity) == (160, 160, 600, "tensor")

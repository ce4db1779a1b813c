"""The four domains of digits, their copies, and the network that learns them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from domain_generalization import digit_domains
from domain_generalization.small_resnet import small_resnet


@pytest.fixture(scope="module")
def domains() -> dict[str, digit_domains.Domain]:
    return digit_domains.load_domains(seed=3)


def test_four_domains_with_images_in_range_and_every_digit(domains: dict[str, digit_domains.Domain]) -> None:
    assert tuple(domains) == digit_domains.DOMAINS == ("handwritten", "printed", "blended", "sketch")
    for images, labels in domains.values():
        assert images.shape == (len(labels), 3, 32, 32)
        assert images.dtype == torch.float32
        assert labels.dtype == torch.int64
        assert len(labels) > 500
        assert images.isfinite().all()
        assert images.min() >= 0
        assert images.max() <= 1
        assert labels.unique().tolist() == list(range(10))


def test_the_seed_decides_the_images(domains: dict[str, digit_domains.Domain]) -> None:
    again, other = digit_domains.load_domains(seed=3), digit_domains.load_domains(seed=4)
    for name, (images, labels) in domains.items():
        assert torch.equal(images, again[name].images)
        assert torch.equal(labels, again[name].labels)
        assert not torch.equal(images, other[name].images)


def test_loading_leaves_the_global_generators_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    digit_domains.load_domains(seed=0)
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("seed", [0, 1, 3])
def test_no_handwritten_image_is_in_two_domains(seed: int) -> None:
    thirds = digit_domains.handwritten_thirds(seed)
    assert set(thirds) == {"handwritten", "blended", "sketch"}
    together = np.concatenate(list(thirds.values()))
    assert len(together) == len(np.unique(together)) == len(load_digits().target)
    assert {len(third) for third in thirds.values()} == {599}


def test_domains_are_made_from_their_thirds(domains: dict[str, digit_domains.Domain]) -> None:
    for name, third in digit_domains.handwritten_thirds(seed=3).items():
        assert domains[name].labels.tolist() == load_digits().target[third].tolist()


def test_domains_look_as_they_are_described(domains: dict[str, digit_domains.Domain]) -> None:
    def grey(images: torch.Tensor) -> bool:
        return torch.equal(images[:, 0], images[:, 1]) and torch.equal(images[:, 0], images[:, 2])

    assert grey(domains["handwritten"].images)
    assert grey(domains["sketch"].images)
    assert not grey(domains["printed"].images)
    assert not grey(domains["blended"].images)
    # Light on black, dark on light, dark lines on white: seen at the border, where there is no digit.
    border = {name: domain.images[:, :, 0].median().item() for name, domain in domains.items()}
    assert border["handwritten"] == 0
    assert border["sketch"] == 1
    assert border["printed"] > 0.6
    assert domains["printed"].images.amin(dim=(1, 2, 3)).max() < 0.5


def test_blurred_copies_are_smooth_and_keep_brightness(domains: dict[str, digit_domains.Domain]) -> None:
    images = domains["printed"].images[:20]
    copies = digit_domains.blurred(images)
    assert copies.shape == images.shape
    assert copies.dtype == images.dtype
    assert torch.equal(copies, digit_domains.blurred(images))
    assert copies.diff(dim=3).abs().mean() < 0.8 * images.diff(dim=3).abs().mean()
    torch.testing.assert_close(copies.mean(), images.mean(), atol=0.01, rtol=0)


def test_noisy_copies_follow_their_seed_and_stay_in_range(domains: dict[str, digit_domains.Domain]) -> None:
    images = domains["sketch"].images[:20]
    copies = digit_domains.noisy(images, seed=1)
    assert torch.equal(copies, digit_domains.noisy(images, seed=1))
    assert not torch.equal(copies, digit_domains.noisy(images, seed=2))
    assert not torch.equal(copies, images)
    assert copies.min() >= 0
    assert copies.max() <= 1


def test_the_sample_picture_is_written(domains: dict[str, digit_domains.Domain], tmp_path: Path) -> None:
    digit_domains.save_samples(domains, tmp_path / "samples.png")
    assert (tmp_path / "samples.png").read_bytes().startswith(b"\x89PNG")


def test_the_network_is_small_traceable_and_follows_its_seed() -> None:
    network = small_resnet(seed=0)
    assert 75_000 < sum(parameter.numel() for parameter in network.parameters()) < 85_000
    traced = torch.fx.symbolic_trace(network)
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(traced.eval()(x), network.eval()(x))
    calls = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert len(calls) == len(set(calls))
    assert {type(m) for m in network.modules()} >= {nn.Conv2d, nn.Linear, nn.BatchNorm2d, nn.ReLU}
    same, other = small_resnet(seed=0), small_resnet(seed=1)
    assert torch.equal(same.stem.weight, network.stem.weight)
    assert not torch.equal(other.stem.weight, network.stem.weight)

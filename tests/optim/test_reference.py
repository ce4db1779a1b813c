"""The plain step of reference.py, as a judge of the optimizer."""

import pytest
import torch
from torch.nn import functional as F

from gaqat_optim import SAGM, DisorderFreeze, GAQATOptimizer, scale_parameters
from gaqat_optim.optim.reference import ReferenceGAQAT
from training import quantized_mlp

X, Y = torch.randn(24, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)), torch.arange(24) % 4
BASES = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9),
    "adam": lambda params: torch.optim.Adam(params, lr=1e-2),
}


def network():
    return quantized_mlp().double()


@pytest.mark.parametrize("threshold", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("base", BASES)
def test_the_optimizer_makes_the_steps_of_the_paper(base, threshold):
    """float64: the same sums, perhaps in another order."""
    ours, plain = network(), network()
    optimizer = GAQATOptimizer(
        BASES[base](ours.parameters()), ours, perturbation=SAGM(0.3, 0.01), freezing=DisorderFreeze(3, threshold)
    )
    scales = scale_parameters(plain).values()
    settings = {"rho": 0.3, "alpha": 0.01, "window": 3, "threshold": threshold}
    reference = ReferenceGAQAT(BASES[base](plain.parameters()), scales, **settings)

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(ours(X), Y)
        loss.backward()
        return loss

    frozen = 0
    for _ in range(13):
        expected = reference.step(lambda: F.cross_entropy(plain(X), Y))
        torch.testing.assert_close(optimizer.step(closure).detach(), expected, rtol=1e-10, atol=1e-12)
        masks = [reference.frozen[s] for s in scales]
        assert [r.frozen for r in optimizer.scale_report()] == [mask.float().mean().item() for mask in masks]
        frozen += sum(int(mask.sum()) for mask in masks)
    for p, q in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)
    assert (frozen > 0) == (threshold > 0)

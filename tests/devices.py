"""The device of the tests that run on any: TEST_DEVICE=cuda, or the CPU. Their fixture ``device`` is in conftest.py.

`make gpu` runs every test that has this fixture, and no other.
"""

import os

import pytest
import torch

DEVICE = torch.device(os.environ.get("TEST_DEVICE", "cpu"))
needs_cuda = pytest.mark.skipif(DEVICE.type != "cuda", reason="needs TEST_DEVICE=cuda")


def build(make_optimizer):
    """An optimizer of torch; skips the test if this torch has no fused kernel for it on the device (Adagrad's)."""
    try:
        return make_optimizer()
    except RuntimeError as error:
        if DEVICE.type == "cpu" or "`fused=True` requires" not in str(error):
            raise
        pytest.skip("torch refuses fused=True for this optimizer on this device")


def on_device(t):
    """``t`` on the device, with its strides, which ``Tensor.to`` keeps only where they leave no gaps."""
    if t.device.type == DEVICE.type:
        return t
    whole = torch.empty(0, dtype=t.dtype).set_(t.detach().untyped_storage())
    return whole.to(DEVICE).as_strided(t.shape, t.stride(), t.storage_offset())

"""One registry of operators for all exports: torch's exporter makes it anew each time, half of a small export."""

import functools

import pytest


@pytest.fixture(scope="session", autouse=True)
def _one_registry():
    from torch.onnx._internal.exporter._registration import ONNXRegistry  # torch has no public name for it

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(functools.cache(ONNXRegistry.from_torchlib)))
        yield

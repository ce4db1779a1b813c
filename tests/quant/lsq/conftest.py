"""Runs a test twice, on any device: for ``lsq_quantize``, and as in a layer, where backward uses the output."""

import pytest

from quant.lsq import cases


@pytest.fixture(params=["as a function", "as in a layer"], scope="module")
def with_and_without_output(request, device):  # cases.run is on the device
    cases.SAVE_OUTPUT[0] = request.param == "as in a layer"
    yield
    cases.SAVE_OUTPUT[0] = False

"""Most files of this folder export."""

import pytest

from gaqat_optim.deploy.onnx_export import export


@pytest.fixture(scope="session", autouse=True)
def _exports(one_registry):
    pass


@pytest.fixture(autouse=True)
def _no_warning_of_the_machine(monkeypatch):
    """That its onnxruntime multiplies wrongly: what a test expects is the same on every processor."""
    monkeypatch.setattr(export, "wrong_products", lambda: None)

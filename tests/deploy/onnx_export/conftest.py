"""What several test files of this folder export."""

import pytest

from deploy.deploy_networks import images, trained
from gaqat_optim import QuantConfig, export_onnx


@pytest.fixture(scope="session")
def resnet(tmp_path_factory):
    """A residual network at W3A3, and its file."""
    model = trained("resnet", QuantConfig(3, 3))
    return model, export_onnx(model, images(8), tmp_path_factory.mktemp("resnet") / "net.onnx", check=False).path

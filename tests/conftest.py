"""Settings for all tests: one thread and one seed, so that a run repeats to the bit, and one hypothesis profile."""

import hypothesis
import pytest
import torch

from devices import DEVICE
from torchvision_import import import_torchvision

hypothesis.settings.register_profile(
    "suite",
    deadline=None,  # no test depends on the speed of the machine
    derandomize=True,  # the same examples in every run: a failure in CI is a failure here
    max_examples=100,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("suite")


@pytest.fixture(autouse=True)
def _repeatable():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if DEVICE.type == "cuda":  # neither rounds products to TF32 nor adds up in another order in another run
        torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic = False, True
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device of a test that runs on any. `make gpu` runs the tests that have this fixture."""
    return DEVICE


@pytest.fixture(scope="session")
def torchvision() -> None:
    """Makes `import torchvision` work beside any build of torch. Skips the test if torchvision is not installed."""
    try:
        import_torchvision()
    except ModuleNotFoundError:
        pytest.skip("torchvision is not installed")

"""Settings for all tests: one thread and one seed, so that a run repeats to the bit, and the profiles of hypothesis."""

import functools

import hypothesis
import pytest
import torch

from devices import DEVICE
from selection import mark_slow
from torchvision_import import import_torchvision

for name, examples in (("suite", 20), ("all", 100)):  # `make test`, `make test-all`
    hypothesis.settings.register_profile(
        name,
        deadline=None,  # no test depends on the speed of the machine
        derandomize=True,  # the same examples in every run: a failure in CI is a failure here
        max_examples=examples,
        suppress_health_check=[hypothesis.HealthCheck.too_slow],
    )
hypothesis.settings.load_profile("suite")


@pytest.hookimpl(tryfirst=True)  # before pytest looks for the tests that are marked
def pytest_collection_modifyitems(items):
    if DEVICE.type == "cpu":  # on a GPU, `make gpu` has few tests, and all of them
        mark_slow(items)


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


@pytest.fixture(scope="session")
def one_registry() -> None:
    """One registry of ONNX operators for all exports: torch makes it anew for each, half of the time of a small one."""
    from torch.onnx._internal.exporter._registration import ONNXRegistry  # torch has no public name for it

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(functools.cache(ONNXRegistry.from_torchlib)))
        yield

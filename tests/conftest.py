"""Settings for all tests: one thread and one seed, so that a run repeats to the bit; one hypothesis profile.

And a torchvision that can be imported.
"""

import hypothesis
import pytest
import torch

from torchvision_import import import_torchvision

hypothesis.settings.register_profile(
    "suite",
    deadline=None,  # a machine may be slow; no test judges time
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
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def torchvision() -> None:
    """Makes `import torchvision` work, whether or not its compiled part does; without the package, skips."""
    try:
        import_torchvision()
    except ModuleNotFoundError:
        pytest.skip("torchvision is not installed")

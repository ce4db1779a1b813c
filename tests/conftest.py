"""Settings for all tests: one thread and one seed, so that a run repeats to the bit; one hypothesis profile.

And a torchvision that can be imported.
"""

import sys
import warnings

import hypothesis
import pytest
import torch

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


# torchvision registers shape functions for these two operators when it is imported. Where its compiled part does not
# fit the installed torch (no build of it fits this one on a CPU), the operators do not exist and the import fails.
# Their names are then enough: models and transforms call none of them.
_OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_libraries: list[torch.library.Library] = []  # an operator lives as long as the library object that defined it


def _import_torchvision() -> None:
    try:
        import torchvision
    except RuntimeError:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "FRAGMENT")
        for operator in _OPERATORS:
            library.define(operator)
        _libraries.append(library)
        import torchvision
    assert torchvision.__version__


@pytest.fixture(scope="session")
def torchvision() -> None:
    """Makes `import torchvision` work, whether or not its compiled part does; without the package, skips."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns of the compiled part that it could not load
            _import_torchvision()
    except ModuleNotFoundError:
        pytest.skip("torchvision is not installed")

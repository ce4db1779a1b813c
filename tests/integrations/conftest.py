"""No test here may use a network, and none may see the process-wide state that another test left in Accelerate."""

import os
import warnings

import pytest

# Read when the packages are imported.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"


@pytest.fixture
def fresh_accelerate(torchvision):
    """Accelerate keeps its precision and its accumulation in singletons; a Trainer does too, through it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its imports are not ours to judge
        state = pytest.importorskip("accelerate.state", reason="accelerate is not installed: the extra [integrations]")
    state.AcceleratorState._reset_state(reset_partial_state=True)
    state.GradientState._reset_state()
    yield
    state.AcceleratorState._reset_state(reset_partial_state=True)
    state.GradientState._reset_state()


@pytest.fixture
def transformers(torchvision):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its imports, torchao's among them, are not ours to judge
        transformers = pytest.importorskip("transformers", reason="transformers is not installed: [integrations]")
        for name in (
            "BertForSequenceClassification",
            "GPT2LMHeadModel",
            "T5ForConditionalGeneration",
        ):
            getattr(transformers, name)  # imported when it is first used
    return transformers

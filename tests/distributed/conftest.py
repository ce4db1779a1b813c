"""Two processes, then four; each set is started once, and runs all scenarios."""

import os

import pytest

from distributed import checkpoint_scenarios, ddp_scenarios, fsdp_scenarios, training_scenarios
from distributed.processes import spawn

SCENARIOS = {**training_scenarios.SCENARIOS, **ddp_scenarios.SCENARIOS, **fsdp_scenarios.SCENARIOS}


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """What processes save, for others to load; the same for all pytest processes of a run."""
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID")
    if run is None:
        return tmp_path_factory.mktemp("ranks")
    shared = tmp_path_factory.getbasetemp().parent / f"ranks-{run}"
    shared.mkdir(exist_ok=True)
    return shared


@pytest.fixture(scope="session")
def two(folder, request):
    """Results of two ranks, by scenario."""
    every = any(item.get_closest_marker("slow") for item in request.session.items)
    more = {"fsdp other combinations": training_scenarios.other_combinations} if every else {}
    return spawn({**SCENARIOS, **checkpoint_scenarios.ON_TWO, **more}, 2, folder)


@pytest.fixture(scope="session")
def four(folder, two):
    """Results of four ranks, by scenario; they load what two saved."""
    names = ("ddp combinations", "fsdp combinations", "per rank", "forgotten")
    return spawn({**{name: SCENARIOS[name] for name in names}, **checkpoint_scenarios.ON_FOUR}, 4, folder)


@pytest.fixture(params=["two", "four"])
def ranks(request):
    """The results of two ranks, and of four."""
    return request.getfixturevalue(request.param)

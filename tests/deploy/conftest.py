"""Most files of this folder export."""

import pytest


@pytest.fixture(scope="session", autouse=True)
def _exports(one_registry):
    pass

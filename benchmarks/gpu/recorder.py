"""A plugin of pytest for `make gpu`: only tests of any device, spread over the time, each written down when it is done.

It reads GPU_RECORD, the file of one JSON line a test, and GPU_SECONDS, for which tests begin after the first has.
"""

from __future__ import annotations

import json
import os
import time
from collections import defaultdict
from pathlib import Path

import pytest

RECORD, SECONDS = Path(os.environ["GPU_RECORD"]), float(os.environ["GPU_SECONDS"])
first_began: list[float] = []


def write(**line: object) -> None:
    with RECORD.open("a") as file:
        file.write(json.dumps(line) + "\n")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep the tests with the fixture ``device``: first one case of each, then the next, so that all get their turn."""
    turns: dict[str, int] = defaultdict(int)
    ranked = []
    for item in items:
        if "device" in getattr(item, "fixturenames", ()):
            test = item.nodeid.partition("[")[0]
            ranked.append((turns[test], item))
            turns[test] += 1
    items[:] = [item for _, item in sorted(ranked, key=lambda pair: pair[0])]
    write(collected=[item.nodeid for item in items])


def pytest_runtest_logstart(nodeid: str) -> None:
    write(began=nodeid)


def pytest_runtest_logfinish(nodeid: str) -> None:
    write(finished=nodeid)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.outcome != "passed":
        reason = str(report.longrepr[2]) if isinstance(report.longrepr, tuple) else report.longreprtext[-2000:]
        write(test=report.nodeid, outcome=report.outcome, reason=reason, seconds=round(report.duration, 2))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> bool | None:
    first_began.append(time.monotonic())
    if time.monotonic() - first_began[0] > SECONDS:
        item.session.shouldstop = "the time of the tests is over"
        return True
    return None

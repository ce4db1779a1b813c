"""The workflows run targets of the Makefile that are also run here, and the Pythons of the classifiers."""

import importlib.metadata
import itertools
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = {
    path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) for path in (ROOT / ".github/workflows").glob("*.yml")
}
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def prerequisites(target: str) -> set[str]:
    """A target of the Makefile and what it makes before or by calling make, conditional prerequisites included."""
    ((line, recipe),) = re.findall(rf"^{target}:([^\n#=]*).*\n((?:\t.*\n)*)", MAKEFILE, re.MULTILINE)
    lines = [line, *re.findall(r"\$\(MAKE\)(.*)", recipe)]
    direct = set(re.findall(r"(?<![\w/.$(-])[a-z][a-z-]+(?=[\s)]|$)", " ".join(lines))) & TARGETS
    return {target}.union(*map(prerequisites, direct))


def minor(python: str) -> int:
    return int(python.partition(".")[2])


CLASSIFIERS = importlib.metadata.metadata("gaqat-optim").get_all("Classifier")
TESTED = {c.rpartition(" ")[2] for c in CLASSIFIERS if re.search(r"Python :: 3\.\d+$", c)}
TARGETS = set(re.findall(r"^([a-z][a-z-]+):", MAKEFILE, re.MULTILINE))
RUN_HERE = prerequisites("test") | prerequisites("release-check")


def steps(workflow: dict) -> list[tuple[str, dict, dict]]:
    return [(name, job, step) for name, job in workflow["jobs"].items() for step in job["steps"]]


@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_command_is_a_target_that_test_or_release_check_runs(name):
    for job_name, job, step in steps(WORKFLOWS[name]):
        if "run" not in step or job_name.endswith("windows"):
            continue
        program, *arguments = step["run"].replace("${{ matrix.target }}", "MATRIX").split()
        targets = {argument for argument in arguments if "=" not in argument}
        if "MATRIX" in targets:
            targets = targets - {"MATRIX"} | {target for _, _, target in combinations(job)}
        assert program == "make"
        assert targets <= RUN_HERE, f"{targets - RUN_HERE} of the job {job_name}"


def test_targets_are_found():
    assert {"lint", "unit", "docs", "wheel-test", "dist", "test-oldest", "test-middle", "workflows"} <= RUN_HERE
    assert not {"bench", "pictograms", "help"} & RUN_HERE


def combinations(job: dict) -> set[tuple[str, str, str]]:
    """System, Python and target of the jobs of a matrix."""
    matrix = job["strategy"]["matrix"]
    chosen = [(c["os"], c["python"], c["target"]) for c in matrix.get("include", ())]
    products = itertools.product(*(matrix.get(axis, ()) for axis in ("os", "python", "target")))
    refused = {(c["python"], c["target"]) for c in matrix.get("exclude", ())}
    return {*chosen, *(c for c in products if c[1:] not in refused)}


def test_a_pull_request_runs_the_ends_of_the_matrix_and_every_other_event_all_of_it():
    checks = WORKFLOWS["checks"]
    assert set(checks[True]) == {"push", "schedule", "pull_request", "workflow_dispatch"}  # YAML reads "on" as True
    assert checks[True]["push"] == {"branches": ["main"], "tags": ["v*"]}
    jobs = checks["jobs"]
    for name in ("ends", "ends-windows", "tests", "windows"):
        assert jobs[name]["if"] == f"github.event_name {'==' if 'ends' in name else '!='} 'pull_request'"
    everything, ends = combinations(jobs["tests"]), combinations(jobs["ends"])
    assert ends < everything
    assert {(python, target) for _, python, target in ends} == {
        ("3.10", "test-oldest"),
        (max(TESTED, key=minor), "unit"),
    }
    assert {system for system, _, _ in ends} == {system for system, _, _ in everything}
    assert {target for _, _, target in everything} == {"unit", "test-middle", "test-oldest"}
    for target in ("unit", "test-middle"):
        assert {python for _, python, each in everything if each == target} == set(
            jobs["windows"]["strategy"]["matrix"]["python"]
        )
    (setup,) = (step for step in jobs["ends-windows"]["steps"] if "python-version" in step.get("with", {}))
    assert setup["with"]["python-version"] == max(TESTED, key=minor)


@pytest.mark.parametrize("job", ["tests", "windows"])
def test_each_python_has_a_classifier_or_may_fail(job):
    job = WORKFLOWS["checks"]["jobs"][job]
    tried = set(job["strategy"]["matrix"]["python"])
    assert tried >= TESTED
    assert (
        job["continue-on-error"]
        == "${{ " + " || ".join(f"matrix.python == '{p}'" for p in sorted(tried - TESTED)) + " }}"
    )


def test_the_other_jobs_use_a_python_with_a_classifier():
    for workflow in WORKFLOWS.values():
        for _, _, step in steps(workflow):
            versions = str(step.get("with", {}).get("python-version", ""))
            for version in versions.split() if "$" not in versions else ():
                assert version in TESTED


def test_every_job_that_does_not_publish_has_no_right_to_write():
    for workflow in WORKFLOWS.values():
        assert workflow["permissions"] == {"contents": "read"}
        writing = {name for name, job in workflow["jobs"].items() if "permissions" in job}
        assert writing <= {"publish"}


def test_actions_alone_publish_and_no_token_is_named():
    (job,) = (job for workflow in WORKFLOWS.values() for job in workflow["jobs"].values() if "permissions" in job)
    assert job["permissions"] == {"id-token": "write"}
    assert job["environment"]
    assert not [step for step in job["steps"] if "run" in step]
    assert "secrets." not in "".join(map(str, WORKFLOWS.values()))

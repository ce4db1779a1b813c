"""Metadata, constraints, changelog and API pages agree with the package and with each other."""

import importlib.metadata
import importlib.resources
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import gaqat_optim
import gaqat_optim.integrations
from gaqat_optim.quant.nn.registry import QUANTIZED

ROOT = Path(__file__).resolve().parents[2]
DISTRIBUTION = "gaqat-optim"


def constraints(python: str, file: str = "constraints.txt") -> dict[str, Requirement]:
    """The pins of a file that hold for a Python version, by package name."""
    pins: dict[str, Requirement] = {}
    for line in (ROOT / file).read_text(encoding="utf-8").splitlines():
        if not line or line.startswith("#"):
            continue
        pin = Requirement(line)
        if pin.marker is None or pin.marker.evaluate({"python_version": python}):
            assert pin.name not in pins, f"two pins of {pin.name} for Python {python}"
            pins[pin.name] = pin
    return pins


def direct_requirements(python: str) -> list[Requirement]:
    """What the package and its extras need with a Python version."""
    requirements = map(Requirement, importlib.metadata.requires(DISTRIBUTION))
    environments = [
        {"python_version": python, "extra": extra}
        for extra in ("", *importlib.metadata.metadata(DISTRIBUTION).get_all("Provides-Extra"))
    ]
    return [
        requirement
        for requirement in requirements
        if requirement.name != DISTRIBUTION
        and (requirement.marker is None or any(map(requirement.marker.evaluate, environments)))
    ]


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13", "3.14"])
def test_every_direct_requirement_is_pinned_within_its_range(python):
    pins = constraints(python)
    for requirement in direct_requirements(python):
        (pin,) = pins[requirement.name].specifier
        assert pin.operator == "=="
        assert requirement.specifier.contains(pin.version), f"{requirement} does not admit {pin.version}"


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12"])
def test_every_lower_bound_is_what_make_test_oldest_installs(python):
    pins = constraints(python, "constraints-oldest.txt")
    for requirement in direct_requirements(python):
        (lowest,) = (bound.version for bound in requirement.specifier if bound.operator == ">=")
        (pin,) = pins[requirement.name].specifier
        assert (pin.operator, Version(pin.version)) == ("==", Version(lowest)), requirement.name


def test_the_core_needs_torch_numpy_and_typing_extensions_alone():
    core = {requirement.name for requirement in direct_requirements("3.11") if requirement.marker is None}
    assert core == {"torch", "numpy", "typing-extensions"}


def test_the_extras():
    extras = importlib.metadata.metadata(DISTRIBUTION).get_all("Provides-Extra")
    assert set(extras) == {
        "onnx",
        "packed",
        "plot",
        "examples",
        "cluster",
        "vision",
        "integrations",
        "docs",
        "dev",
    }


def test_importing_the_package_imports_no_extra():
    program = """
import sys, torch
before = set(sys.modules)
import gaqat_optim
import gaqat_optim.integrations
from gaqat_optim.quant.nn.registry import QUANTIZED
print(*{name.partition(".")[0] for name in set(sys.modules) - before})
"""
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    imported = set(output.split())
    assert "gaqat_optim" in imported
    assert not imported & {
        "onnx",
        "onnxscript",
        "onnxruntime",
        "safetensors",
        "matplotlib",
        "sklearn",
        "scipy",
        "PIL",
        "torchvision",
    }


def test_the_package_is_marked_as_typed():
    assert importlib.resources.files(gaqat_optim).joinpath("py.typed").is_file()


def test_the_version_is_a_normalized_one_and_no_public_name():
    assert str(Version(gaqat_optim.__version__)) == gaqat_optim.__version__
    assert "__version__" not in gaqat_optim.__all__


def test_no_other_file_repeats_the_version():
    """Build, documentation and studies read gaqat_optim.__version__. release/tag.py compares changelog and citation."""
    files = (ROOT / "pyproject.toml", ROOT / "docs" / "conf.py")
    assert [file.name for file in files if gaqat_optim.__version__ in file.read_text(encoding="utf-8")] == []


def test_torch_in_the_middle_lies_between_the_oldest_and_the_newest():
    files = ("constraints-oldest.txt", "constraints-middle.txt", "constraints.txt")
    oldest, middle, newest = (Version(str(constraints("3.11", file)["torch"].specifier)[2:]) for file in files)
    assert oldest < middle < newest
    assert set(constraints("3.11", "constraints-middle.txt")) == {"torch", "torchvision"}
    page = (ROOT / "docs" / "contributing.md").read_text(encoding="utf-8")
    for target, torch in (("test", newest), ("test-middle", middle), ("test-oldest", oldest)):
        assert f"`make {target}` with torch {torch.major}.{torch.minor}" in " ".join(page.split())


def test_the_documentation_reads_the_projects_urls_from_pyproject():
    urls = importlib.metadata.metadata(DISTRIBUTION).get_all("Project-URL")
    assert runpy.run_path(str(ROOT / "docs" / "conf.py"))["project_urls"] == dict(url.split(", ") for url in urls)


def test_the_pages_document_every_public_name_once_and_no_other():
    pages = [page.read_text(encoding="utf-8") for page in (ROOT / "docs").rglob("*.md")]
    documented = re.findall(r"^\.\. auto(?:function|class):: (\w+)$", "\n".join(pages), re.MULTILINE)
    assert sorted(documented) == sorted([*gaqat_optim.__all__, *gaqat_optim.integrations.__all__])


def test_the_page_on_networks_names_every_module_that_is_quantized():
    page = (ROOT / "docs" / "networks.md").read_text(encoding="utf-8")
    table = page[page.index("| module |") : page.index("Refused modules")]
    ours = [kind.__name__ for kind, quantized in QUANTIZED.items() if quantized.__module__.startswith("gaqat_optim.")]
    assert [name for name in ours if f"`{name}`" not in table] == []

import pytest

from affected_tests import ROOT, mirror_of

SOURCE = {"tests/test_import_arrows.py", "tests/packaging/test_metadata.py"}


@pytest.mark.parametrize(
    ("file", "tests"),
    [
        ("src/gaqat_optim/quant/config.py", {"tests/quant/test_config.py", "src/gaqat_optim/quant/config.py"} | SOURCE),
        ("src/gaqat_optim/quant/removed.py", SOURCE),
        ("examples/digits.py", {"tests/examples/test_digits.py"}),
        ("examples/domain_generalization/augmentation.py", {"tests/examples/test_augmentation.py"}),
        ("release/tag.py", {"tests/release/test_tag.py"}),
        ("tests/quant/test_config.py", {"tests/quant/test_config.py"}),
        ("tests/quant/test_removed.py", set()),
        ("tests/training.py", set()),
        ("README.md", {"tests/packaging"}),
        ("docs/method.md", {"tests/packaging"}),
        (".github/workflows/checks.yml", {"tests/packaging"}),
        ("constraints.txt", {"tests/packaging"}),
        ("benchmarks/run.py", set()),
    ],
)
def test_the_tests_that_mirror_a_file(file, tests):
    assert set(mirror_of(file, ROOT)) == tests


def test_files_for_aspects_of_a_module_are_its_tests_too():
    tests = mirror_of("src/gaqat_optim/optim/optimizer.py", ROOT)
    assert {"tests/optim/test_optimizer_groups.py", "tests/optim/test_optimizer_memory.py"} <= set(tests)


def test_every_source_file_has_tests_of_its_own():
    """Otherwise `make check` would leave a file out."""
    files = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "src").rglob("*.py"))
    modules = [file for file in files if not file.endswith("__init__.py")]
    assert [file for file in modules if set(mirror_of(file, ROOT)) <= SOURCE | {file}] == []

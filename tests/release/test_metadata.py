import pytest
from packaging.metadata import ExceptionGroup  # Python 3.10 has none
from release.metadata import core_requirements, faults

GOOD = """\
Metadata-Version: 2.4
Name: gaqat-optim
Version: 1.0
Summary: One line.
Keywords: LSQ,SAM
License-Expression: Apache-2.0
License-File: LICENSE
Project-URL: Repository, https://nowhere.example/gaqat-optim
Classifier: Programming Language :: Python :: 3
Requires-Python: >=3.10
Requires-Dist: torch<3,>=2.8
Requires-Dist: onnx>=1.17; extra == 'onnx'
Provides-Extra: onnx
Description-Content-Type: text/markdown

# A description
"""


def test_good_metadata_have_no_fault():
    assert faults(GOOD.encode(), "1.0") == []


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("Python :: 3\n", "Python :: 3.99\n", "unknown classifier: Programming Language :: Python :: 3.99"),
        ("Version: 1.0", "Version: 1.1", "version 1.1, and the file name says 1.0"),
        ("torch<3,>=2.8", "torch @ https://nowhere.example/torch.whl", "a requirement by URL: torch"),
        ("https://nowhere", "http://nowhere", "a URL that is not https: http://nowhere.example/gaqat-optim"),
        ("Repository,", f"{'R' * 33},", f"a label of more than 32 characters: {'R' * 33}"),
        ("text/markdown", "text/plain", "no description in Markdown"),
        ("# A description", "", "no description in Markdown"),
        ("Requires-Python: >=3.10\n", "", "no requires_python"),
        ("Keywords: LSQ,SAM\n", "", "no keywords"),
        (
            "Classifier: Programming Language :: Python :: 3",
            "Classifier: License :: OSI Approved :: Apache Software License",
            "classifier of a licence beside License-Expression: License :: OSI Approved :: Apache Software License",
        ),
    ],
)
def test_each_fault_is_named(old, new, fault):
    assert old in GOOD
    (named,) = faults(GOOD.replace(old, new).encode(), "1.0")
    assert named.startswith(fault)


def test_what_the_specifications_forbid_raises():
    with pytest.raises(ExceptionGroup, match="metadata"):
        faults(GOOD.replace("Apache-2.0", "The Apache licence").encode(), "1.0")


def test_requirements_of_extras_are_not_core():
    assert [str(requirement) for requirement in core_requirements(GOOD.encode())] == ["torch<3,>=2.8"]

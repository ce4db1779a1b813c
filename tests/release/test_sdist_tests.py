import io
import tarfile

from release.placeholders import ROOT
from release.sdist_tests import QUICK, outside, unpack


def test_the_selection_exists():
    assert [test for test in QUICK if not (ROOT / test).exists()] == []


def test_an_sdist_is_unpacked_into_its_folder(tmp_path):
    sdist = tmp_path / "gaqat_optim-1.0.tar.gz"
    with tarfile.open(sdist, "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("gaqat_optim-1.0/README.md"), io.BytesIO())
    assert [file.name for file in unpack(sdist, tmp_path / "there").iterdir()] == ["README.md"]


def test_nothing_leads_back_to_the_working_copy(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "src")
    monkeypatch.setenv("VIRTUAL_ENV", ".venv")
    assert not {"PYTHONPATH", "VIRTUAL_ENV"} & set(outside())

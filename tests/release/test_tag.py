from release.tag import ROOT, disagreements, latest_release, unfit_for_publishing, version_of

import gaqat_optim

CHANGELOG = "# Changelog\n\n## [Unreleased]\n\n## [1.1.0] - 2030-02-01\n\n- a line\n\n## [1.0.0] - 2030-01-01\n"
CITATION = 'cff-version: 1.2.0\nversion: 1.1.0\ndate-released: "2030-02-01"\n'


def test_the_version_is_read_without_importing_the_package():
    assert version_of((ROOT / "src/gaqat_optim/__init__.py").read_text(encoding="utf-8")) == gaqat_optim.__version__


def test_changelog_and_citation_of_this_tree_agree_with_the_version():
    changelog, citation = ((ROOT / name).read_text(encoding="utf-8") for name in ("CHANGELOG.md", "CITATION.cff"))
    assert disagreements(gaqat_optim.__version__, changelog, citation) == []


def test_the_newest_dated_heading_counts():
    assert latest_release(CHANGELOG) == ("1.1.0", "2030-02-01")
    assert latest_release("## [Unreleased]\n") == ("none", "never")


def test_each_disagreement_is_named():
    assert disagreements("1.1.0", CHANGELOG, CITATION) == []
    assert len(disagreements("1.2.0", CHANGELOG, CITATION)) == 2
    (date,) = disagreements("1.1.0", CHANGELOG, CITATION.replace("02-01", "02-02"))
    assert "2030-02-02" in date


def test_only_a_tag_of_the_version_without_placeholders_and_open_lines_is_published():
    assert unfit_for_publishing("v1.1.0", "1.1.0", CHANGELOG, []) == []
    assert unfit_for_publishing("v1.1.0", "1.1.0", CHANGELOG, ["a.md:1: URL"]) == ["a placeholder: a.md:1: URL"]
    assert len(unfit_for_publishing("1.1.0", "1.1.0", CHANGELOG, [])) == 1
    unreleased = CHANGELOG.replace("[Unreleased]\n", "[Unreleased]\n\n- a line\n")
    assert len(unfit_for_publishing("v1.1.0", "1.1.0", unreleased, [])) == 1

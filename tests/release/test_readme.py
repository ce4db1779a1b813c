import pytest
from readme_renderer import markdown
from release.readme import main, relative_references


@pytest.mark.parametrize(
    "text", ["[page](docs/page.md)", "![picture](docs/images/picture.png)", "[page](page.md#anchor)", "[a](http://b)"]
)
def test_a_relative_or_unencrypted_reference_is_refused(tmp_path, text):
    file = tmp_path / "README.md"
    file.write_text(f"# Title\n\nWords and {text}.\n")
    with pytest.raises(SystemExit, match=r"README\.md: an index cannot follow"):
        main(file)


def test_whole_urls_pass(tmp_path, capsys):
    file = tmp_path / "README.md"
    file.write_text("# Title\n\n[page](https://nowhere.example/page) ![picture](https://nowhere.example/p.png)\n")
    main(file)
    assert "renders" in capsys.readouterr().out


def test_references_in_html_are_found():
    html = markdown.render('<img src="a.png" alt="a"> <a href="#here">here</a> <a href="b.md">b</a>')
    assert relative_references(html) == ["a.png", "b.md"]

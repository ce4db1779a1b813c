from release.links import ROOT, broken_links, broken_markdown_links


def write(folder, **pages):
    for name, html in pages.items():
        (folder / f"{name}.html").write_text(html)


def test_links_to_files_folders_and_anchors_are_followed(tmp_path):
    (tmp_path / "api").mkdir()
    write(tmp_path / "api", index='<a href="../a.html#top">a</a>')
    write(
        tmp_path,
        a='<p id="top"></p><a href="api/">api</a> <a href="#top">t</a> <a href="https://nowhere.example/">n</a>',
    )
    assert broken_links(tmp_path) == []


def test_a_link_a_picture_and_an_anchor_that_lead_nowhere_are_named(tmp_path):
    write(tmp_path, a='<a href="c.html">c</a> <img src="p.png"> <a href="b.html#no">b</a>', b="")
    assert broken_links(tmp_path) == [
        "a.html: no anchor for b.html#no",
        "a.html: no file for c.html",
        "a.html: no file for p.png",
    ]


def test_relative_links_of_pages_at_the_root(tmp_path):
    (tmp_path / "A.md").write_text("[b](B.md) [a](A.md#part) [n](https://nowhere.example) [h](#here)")
    assert broken_markdown_links(tmp_path) == ["A.md: no file for B.md"]


def test_no_page_at_the_root_has_a_broken_link():
    assert broken_markdown_links(ROOT) == []

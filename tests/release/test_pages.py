import pytest
from release.pages import problems

EQUATION = '<script src="_static/mathjax/tex-chtml.js?v=1"></script><span class="math notranslate">a</span>'


def listed(folder, html, source=""):
    (folder / "page.html").write_text(html, encoding="utf-8")
    return problems(folder, source)


def test_a_line_of_code_may_have_88_columns(tmp_path):
    code = f"<p>{'x' * 200}</p><pre><span>{'a' * 44}</span>{'&lt;' * 44}\nb</pre><p>{'x' * 200}</p>"
    assert listed(tmp_path, code) == []
    (problem,) = listed(tmp_path, code.replace("\nb", "b"))
    assert problem.startswith("page.html: 89 columns, more than 88: aaa")
    (tmp_path / "api").mkdir()
    (tmp_path / "page.html").rename(tmp_path / "api" / "index.html")
    assert len(listed(tmp_path, "")) == 1


@pytest.mark.parametrize("prompt", ["", ">>> ", "... "])
def test_lines_of_the_source_are_not_judged(tmp_path, prompt):
    line = "call(" + "x" * 90 + ")"
    assert len(listed(tmp_path, f"<pre>{prompt}{line}</pre>", source="call()")) == 1
    assert listed(tmp_path, f"<pre>{prompt}{line}</pre>", source=f"    {prompt}{line}\n") == []


@pytest.mark.parametrize(
    "html",
    [
        '<script src="https://cdn.example/a.js"></script>',
        '<link rel="stylesheet" href="//cdn.example/a.css">',
        '<img src="http://cdn.example/a.png">',
    ],
)
def test_what_a_page_loads_is_beside_it(tmp_path, html):
    assert len(listed(tmp_path, html)) == 1
    here = '<link rel="stylesheet" href="a.css"><link rel="canonical" href="https://a.example/"><img src="a.png">'
    assert listed(tmp_path, here + '<a href="https://a.example/">a</a>') == []


def test_equations_have_mathjax_its_fonts_and_not_all_of_it(tmp_path):
    mathjax = tmp_path / "_static" / "mathjax"
    mathjax.mkdir(parents=True)
    assert listed(tmp_path, "<p>no equation</p>") == []
    assert listed(tmp_path, EQUATION) == [f"{mathjax} has no font for equations"]
    (mathjax / "a.woff").write_bytes(bytes(2**20))
    assert listed(tmp_path, EQUATION) == []
    assert listed(tmp_path, '<span class="math">a</span>') == ["page.html has equations and no MathJax"]
    (mathjax / "rest.js").write_bytes(bytes(3 * 2**20))
    assert listed(tmp_path, EQUATION) == [f"{mathjax} has 4 MiB, more than 3"]

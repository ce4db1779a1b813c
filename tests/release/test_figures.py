import pytest
from release.figures import ROOT, lines_with_figures, pages, untraced

TRACED = "Of `make bench`, 3 May 2026."


def listed(folder, text, **others):
    for name, page in others.items():
        (folder / f"{name}.md").write_text(page, encoding="utf-8")
    (folder / "page.md").write_text(text, encoding="utf-8")
    return [int(line.split(":")[1]) for line in untraced(folder / "page.md", folder)]


@pytest.mark.parametrize(
    ("line", "figures"),
    [
        ("A gain of +1.2 ± 0.3 points, 7 % more.", ["+1.2 ±", "0.3 points", "7 %"]),
        ("It took 1,230 ms, later 4 s, and 2.8 times the memory of 3 MiB.", ["1,230 ms", "4 s", "2.8 times", "3 MiB"]),
        ("| LSQ | 49.2 | −0.5 | 3 |", ["49.2", "−0.5"]),
        ("A 3-bit network, torch 2.13, `rho` 0.05, step 200, 5 domains, a 95 % interval", None),
        ("| torch | npm 1.2.6 | W4A4 | 1.2.6 |", None),
        ("`--limit 5 ms` and $5 %$ and [5](https://a.org/5 ms)", None),
    ],
)
def test_what_counts_as_a_figure(line, figures):
    found = [each.figures for each in lines_with_figures(line)]
    assert found == ([figures] if figures else [])


@pytest.mark.parametrize("directive", ["testoutput", "testcode", "code-block", ""])
def test_code_and_what_it_prints_are_no_figures(tmp_path, directive):
    fence = f"```{{{directive}}}" if directive else "```"
    assert listed(tmp_path, f"{fence}\n5 % of 3 s\n```\nAfter it: 5 %.\n") == [4]


@pytest.mark.parametrize(
    "words",
    ["make bench, 2026-05-03", "No command\nrepeats it; 3 May 2026", "Drawn by `docs/figures/a.py` on 3 May 2026"],
)
def test_a_command_and_a_date_before_or_after_trace_a_figure(tmp_path, words):
    assert listed(tmp_path, f"# Title\n\n5 %\n\n{words}\n") == []


@pytest.mark.parametrize("words", ["", "make bench", "3 May 2026", "python was used on 3 May 2026", "may 3"])
def test_one_of_both_is_not_enough(tmp_path, words):
    assert listed(tmp_path, f"# Title\n\n5 %\n\n{words}\n") == [3]


def test_words_hold_for_their_section_and_those_inside_it(tmp_path):
    page = f"# Title\n\n5 %\n\n## A\n\n5 %\n\n{TRACED}\n\n### Inside\n\n5 %\n\n## B\n\n5 %\n"
    assert listed(tmp_path, page) == [3, 17]
    assert listed(tmp_path, page.replace("# Title\n", f"# Title\n\n{TRACED}\n", 1)) == []


@pytest.mark.parametrize(("start", "end"), [("```{figure} a.svg", "```"), (":::{note}", ":::")])
def test_words_of_a_caption_hold_inside_it(tmp_path, start, end):
    assert listed(tmp_path, f"# Title\n\n{start}\n5 %. {TRACED}\n{end}\n\n5 %\n") == [7]


def test_a_figure_is_quoted_as_the_linked_page_has_it(tmp_path):
    there = f"# There\n\n{TRACED} +5.6 ± 0.8 points, 20 %, 12.81 s.\n"
    quote = "# Title\n\n{}: see {{doc}}`there`.\n"
    for text, lines in [("5.6 points", []), ("20 %", []), ("20 s", [3]), ("2.8 s", [3]), ("5.60 s", [3])]:
        assert listed(tmp_path, quote.format(text), there=there) == lines, text
    assert listed(tmp_path, "5.6 points: [there](https://host/docs/there.html)\n", there=there) == []
    assert listed(tmp_path, "5 %: see {doc}`page`\n") == [1]


def test_a_comment_takes_out_the_block_behind_it_and_no_other(tmp_path):
    assert listed(tmp_path, "% not measured: settings\n- 5 %\n  of 5 %\n\n5 %\n\n% another comment\n5 %\n") == [5, 8]


@pytest.mark.parametrize("page", pages(ROOT), ids=lambda path: path.name)
def test_each_measured_figure_names_its_command_and_its_date(page):
    assert untraced(page, ROOT / "docs") == []

"""A table as terminal text, Markdown, CSV and LaTeX."""

from accuracy_cells import add_all, make

from ratplus_exp.analysis import TASKS
from ratplus_exp.report import Table


def test_text_fits_a_terminal(store):
    add_all(store, 1, 9)
    text = make(store).to_text().splitlines()
    assert max(map(len, text)) <= 120
    assert "seeds" not in text[2].split()  # the same in all rows: the caption has it
    add_all(store, 1, 5, budget="1/4", top_k=16, n=5)
    assert "n" in make(store).to_text().splitlines()[2].split()


def test_methods_have_their_names_where_people_read_them(store):
    add_all(store, 4, 7)
    table = make(store).without(TASKS)
    for text in (table.to_text(), table.to_markdown(), table.to_latex()):
        row = next(line for line in text.splitlines() if "Quest" in line and "70.0" in line)
        assert row.replace("|", "").replace("&", "").split()[:4] == ["Quest", "8", "4", "1/16"]
    assert "\nquest,8,4,1/16,0.070,RAT+,70.0," in table.to_csv()


def test_all_formats_are_written(tmp_path):
    table = Table("A_title", "50 % of {x} & ~y^2 \\ #1 $", ("name", "Δ"), (("a|b", "−1.5"),))
    table.write(tmp_path / "tables", "demo")
    texts = {path.name: path.read_text() for path in (tmp_path / "tables").iterdir()}
    assert set(texts) == {"demo.md", "demo.csv", "demo.tex"}
    markdown, comma, latex = (texts[f"demo.{suffix}"] for suffix in ("md", "csv", "tex"))
    assert r"| a\|b | −1.5 |" in markdown and "|:-----|-----:|" in markdown
    assert comma == "name,Δ\na|b,-1.5\n"
    assert (
        r"A\_title. 50 \% of \{x\} \& \textasciitilde{}y\^{}2 "
        r"\textbackslash{} \#1 \$" in latex
    )
    assert r"\begin{tabular}{lr}" in latex and "a|b  & $-$1.5 \\\\\n" in latex

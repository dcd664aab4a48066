"""The report's page."""

import re
from html.parser import HTMLParser

from ratplus_exp.report.sections import Section, write_page
from ratplus_exp.report.table import Table

PIXEL = bytes.fromhex("89504e470d0a1a0a")


class Checker(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.links, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "img"):
            self.open.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_stands_alone_and_says_everything(tmp_path):
    (tmp_path / "fig.png").write_bytes(PIXEL)
    table = Table("T & co", "Caption <here>.", ("Who", "x"), (("a<b", "1.0"), ("c", "—")))
    parts = (("Some words.",), ("A point.",), (table,), tmp_path / "fig.png", "Drawn of n = 5.")
    sections = [Section("One", *parts), Section("Two", code="a: 1\n")]
    html, markdown = write_page("Title", sections, tmp_path)
    page = Checker()
    page.feed(html.read_text())
    assert page.open == []
    assert all(link.startswith(("#s", "data:image/png;base64,")) for link in page.links)
    text = " ".join(page.text)
    said = ["Title", "Some words.", "A point.", "T & co", "Caption <here>.", "a<b", "a: 1", "n = 5"]
    assert [x for x in said if x not in text] == []
    assert "<figcaption class=c>Drawn of n = 5.</figcaption></figure>" in html.read_text()
    md = markdown.read_text()
    assert re.search(r"!\[One: fig\]\(fig\.png\)\n\nDrawn of", md) and "| a<b | 1.0 |" in md

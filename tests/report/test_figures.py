"""What figures draw of a filled store."""

from accuracy_cells import DENSE, add, add_all

from ratplus_exp.analysis import TASKS
from ratplus_exp.report import figures
from ratplus_exp.report.results import Results


def test_a_figure_has_a_panel_for_each_method_and_protocol(store, tmp_path, monkeypatch):
    add_all(store, 4, 7, first_token="prefill")
    add_all(store, 2, 3, first_token="split")
    add(store, "ratplus", "S-1", 1, first_token="prefill", budget="1/4", top_k=16)
    add_all(store, 9, 9, **DENSE, first_token=None)
    panels = {}

    def draw(panel, tasks, sides):
        panels[panel.get_title()] = {b: [x.value for x in sides[b]] for b in sides}
        assert tasks == list(TASKS)

    monkeypatch.setattr(figures, "draw_bars", draw)
    assert figures.accuracy_by_task(Results.read(store, {}), tmp_path).exists()
    assert list(panels) == ["dense", "Quest, 1/16", "Quest, 1/16, split"]
    assert panels == {
        "dense": {"Attention": [90] * 8, "RAT+": [90] * 8},
        "Quest, 1/16": {"Attention": [40] * 8, "RAT+": [70] * 8},
        "Quest, 1/16, split": {"Attention": [20] * 8, "RAT+": [30] * 8},
    }

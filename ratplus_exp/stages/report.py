"""stage=report: P1's Table 3 from the cells that are finished."""

from __future__ import annotations

import json
from pathlib import Path

from omegaconf import DictConfig

from ratplus_exp.config import plain
from ratplus_exp.results import (
    Store,
    sample_scores,
    table3,
    tidy,
    write_atomically,
    write_cells_csv,
)
from ratplus_exp.results.figures import accuracy_by_budget
from ratplus_exp.results.frame import select
from ratplus_exp.stages.common import job_folder, resolve
from ratplus_exp.tracking import log_frame, log_image, tracked


def run(cfg: DictConfig) -> None:
    """Print the table; write it (Markdown, CSV, LaTeX) with the cells it was made from."""
    root = resolve(cfg.results)
    store = Store(root)
    where = {"tier": cfg.model.tier, "context_length": cfg.data.length} | plain(cfg.stage.where)
    cells = select(tidy(store), where)
    table = table3(
        (cells, sample_scores(store)),
        cfg.model.tier,
        cfg.stage.scorer,
        first_token=cfg.stage.first_token,
    )
    folder = Path(cfg.stage.folder) if cfg.stage.folder else job_folder()
    paths = table.write(folder, "table3")
    paths.append(write_cells_csv(cells, folder / "cells.csv"))
    title = (
        f"NIAH, mean of the tasks; tier {cfg.model.tier}, {cfg.data.length} tokens (dotted: dense)"
    )
    pictures = accuracy_by_budget(cells, folder, "accuracy_by_budget", title)
    paths += pictures
    paths.append(_write_provenance(store, set(cells["cell"]), folder))
    print(table.to_text())
    print("Written:", ", ".join(map(str, paths)))
    with tracked(cfg, job_folder()) as tracker:
        log_frame(tracker, "cells", cells)
        for picture in pictures[:1]:
            log_image(tracker, "accuracy_by_budget", picture)


def _write_provenance(store: Store, ids: set[str], folder: Path) -> Path:
    """provenance.json: for every cell its key, and who ran it: command, commit, versions, date."""
    entries = {}
    for cell in store.cells("eval"):
        if cell.id in ids:
            runs = [{k: v for k, v in run.items() if k != "config"} for run in cell.provenance()]
            key = {k: v for k, v in cell.key.items() if k != "data"}
            entries[cell.id] = {"key": key, "runs": runs}
    path = folder / "provenance.json"
    write_atomically(path, json.dumps(entries, indent=1) + "\n")
    return path

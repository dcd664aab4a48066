"""stage=report: P1's Table 3 from the cells that are finished."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from ratplus_exp.results import Store, sample_scores, table3, tidy, write_cells_csv
from ratplus_exp.stages.common import job_folder, resolve
from ratplus_exp.tracking import log_frame, tracked


def run(cfg: DictConfig) -> None:
    """Print the table; write it (Markdown, CSV, LaTeX) with the cells it was made from."""
    root = resolve(cfg.results)
    store = Store(root)
    frames = tidy(store), sample_scores(store)
    where = {"context_length": cfg.data.length} | {
        name: list(values) for name, values in cfg.stage.where.items()
    }
    table = table3(frames, cfg.model.tier, cfg.stage.scorer, **where)
    folder = Path(cfg.stage.folder) if cfg.stage.folder else job_folder()
    paths = table.write(folder, "table3")
    paths.append(write_cells_csv(frames[0], folder / "cells.csv"))
    print(table.to_text())
    print("Written:", ", ".join(map(str, paths)))
    with tracked(cfg, job_folder()) as tracker:
        log_frame(tracker, "cells", frames[0])

"""The data of a report: the finished cells of one pair of models, read once."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import pandas as pd

from ratplus_exp.analysis import frame, hits
from ratplus_exp.analysis.bootstrap import Bootstrap
from ratplus_exp.analysis.checks import check_unmixed
from ratplus_exp.analysis.means import length_curves, selector_means
from ratplus_exp.analysis.pattern import compare, scaled
from ratplus_exp.report.paper import paper_tables
from ratplus_exp.store import Cell, Finished, Store


@dataclass(frozen=True)
class Results:
    """Finished cells of one pair at one tier, with their statistics. Except in `by_length`, all
    have the same context length.

    cells, rates: rows of `tidy` and `hit_rates`; samples, hit_samples: of `sample_scores`; stored:
    finished cells of the store by id; protocols: the results by protocol, including these.
    """

    cells: pd.DataFrame
    samples: pd.DataFrame
    rates: pd.DataFrame
    hit_samples: pd.DataFrame
    stored: dict[str, Finished]
    scorer: str
    first_token: str
    protocol: str = "whole"
    protocols: dict[str, Results] = field(default_factory=dict)

    @classmethod
    def read(
        cls,
        store: Store,
        where: dict[str, Any],
        like: Iterable[Cell] | None = None,
        scorer: str = "exact",
        first_token: str = "prefill",
        protocol: str = "whole",
    ) -> Results:
        """where: for `select` on `tidy`; like: cells in the wanted settings, of any seed (None: all
        settings); first_token: for methods that it affects. ValueError if no finished cell fits."""
        stored = [x for stage in frame.FIELDS for x in frame.finished(store, stage)]
        if like is not None:
            settings = {_without_seed(cell) for cell in like}
            stored = [x for x in stored if _without_seed(x.cell) in settings]
        parts = {x: frame.parts_of_variants(frame.tidy(stored, x)) for x in frame.FIELDS}
        if unknown := set(where).difference(frame.COLUMNS, *parts.values()):
            raise ValueError(f"no column {min(unknown)!r} to select by: see stage.where")
        of_eval, of_hits = (
            {x: value for x, value in where.items() if x in frame.COLUMNS or x in parts[stage]}
            for stage in ("eval", hits.STAGE)
        )
        own = {"selector": "topk", **of_hits}  # hit rates are of the methods' own selections
        every = cls(
            cells=frame.select(frame.tidy(stored), of_eval),
            samples=frame.sample_scores(stored, **of_eval),
            rates=hits.hit_rates(stored, **own),
            hit_samples=frame.sample_scores(stored, hits.STAGE, **own),
            stored={x.cell.id: x for x in stored},
            scorer=scorer,
            first_token=first_token,
        )
        for name, token in (("whole", first_token), ("split", "split")):
            part = every._only(first_token=[None, token])
            every.protocols[name] = replace(part, protocol=name)
        if every.protocols[protocol].every.empty:
            choice = ", ".join(f"{name}={value}" for name, value in where.items())
            raise ValueError(f"no finished cells with {choice} in {store.root}: evaluate first")
        return every.protocols[protocol]

    def _only(self, **where: Any) -> Results:
        """The rows of all frames that `select` keeps."""
        names = ("cells", "samples", "rates", "hit_samples")
        return replace(self, **{name: frame.select(getattr(self, name), where) for name in names})

    @cached_property
    def every(self) -> pd.DataFrame:
        """The cells of accuracies and of hit rates."""
        return pd.concat([self.cells, self.rates.drop_duplicates("cell")], ignore_index=True)

    @cached_property
    def of_protocols(self) -> pd.DataFrame:
        """The cells of top-k and dense attention, of every protocol; the protocol of methods that
        do not select after the prompt is "either"."""
        parts = [part.cells.assign(protocol=name) for name, part in self.protocols.items()]
        cells = frame.grouped(pd.concat(parts).drop_duplicates("cell"))
        cells = cells[cells["backbone"].isin(frame.BACKBONES)]
        cells = cells[cells["selector"].isin(["topk", "dense"])]
        protocol = cells["protocol"].mask(cells["first_token"].isna(), "either")
        return cells.assign(protocol=protocol)

    def draws_of(self, protocol: str) -> Bootstrap:
        """`draws` of a protocol of `of_protocols`."""
        return self.protocols["split" if protocol == "split" else "whole"].draws

    @cached_property
    def used(self) -> list[Finished]:
        """The cells of `every`, in the order of their names."""
        ids = set(self.every["cell"])
        return [cell for name, cell in self.stored.items() if name in ids]

    @property
    def tier(self) -> str:
        return str(self.every["tier"].iloc[0])

    @property
    def context(self) -> int:
        """In tokens."""
        return int(self.every["context_length"].iloc[0])

    @cached_property
    def by_length(self) -> dict[int, Results]:
        """The results of each context length."""
        lengths = sorted(map(int, self.every["context_length"].unique()))
        if len(lengths) == 1:
            return {lengths[0]: self}
        return {length: self._only(context_length=length) for length in lengths}

    @cached_property
    def length_curves(self) -> pd.DataFrame:
        return length_curves({length: part.draws for length, part in self.by_length.items()})

    @cached_property
    def trainings(self) -> list[int]:
        return sorted(map(int, self.every["training"].unique()))

    @cached_property
    def draws(self) -> Bootstrap:
        """All accuracies, resampled by `GROUP`. LeftOut if they do not belong together."""
        check_unmixed(frame.grouped(self.cells))
        return Bootstrap(frame.grouped(self.samples), self.scorer, frame.GROUP)

    @cached_property
    def curves(self) -> pd.DataFrame:
        return hits.rank_curves(self.hit_samples)

    @cached_property
    def selector_means(self) -> pd.DataFrame:
        return selector_means(self.draws)

    def paper(self, table: str) -> pd.DataFrame:
        """One of the paper's tables, its block sizes scaled to this context."""
        return scaled(paper_tables(table), self.context)

    def compared(self, table: str) -> pd.DataFrame:
        """One of the paper's tables beside the measured cells: see `compare`."""
        return compare(self.paper(table), frame.grouped(self.cells), self.scorer)


def _without_seed(cell: Cell) -> str:
    return json.dumps({**cell.key, "seed": None}, sort_keys=True)

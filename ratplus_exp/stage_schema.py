"""Every field of the stages, as in `schema`; their defaults are in conf/stage, where `common` has
those of several stages."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, Field

from ratplus_exp.settings import (
    OF_LIST,
    DilatedSettings,
    Dtype,
    Examples,
    Fraction,
    Length,
    Name,
    Names,
    Positive,
    Protocol,
    Rate,
    Seed,
    Seeds,
    Selector,
    Settings,
    Share,
    Text,
    Threads,
    Whole,
)
from ratplus_exp.tasks import GOLDEN, RULER_NAMES
from ratplus_exp.training.settings import TrainSettings

if TYPE_CHECKING:
    Task = str
    Golden = str
else:
    Task = Literal[tuple(RULER_NAMES)]
    Golden = Literal[tuple(GOLDEN)]

Figure = Literal["fig1", "fig2", "fig3", "fig4", "lengths"]
Scorer = Literal["exact", "substring"]
Output = Literal["table2", "table3", "table4", "table5", Figure, "tasks", "report"]


def _not_empty(cells: dict[str, Grid]) -> dict[str, Grid]:
    if not cells:
        raise ValueError("choose what it runs, as in experiment=table3")
    return cells


@dataclass(frozen=True, kw_only=True)
class Grid(Settings):
    """Cells of a sweep: every combination of the lists (`stages.sweep`)."""

    stage: Literal["eval", "hit_rate"] | None = None
    model: Name | Names | None = None  # instead of stage.models
    method: Name | Names | None = None
    budget: Fraction | list[Fraction] | None = None
    blocks: Positive | list[Positive] | None = None
    length: Length | list[Length] | None = None
    selector: Selector | list[Selector] | None = None
    selector_seed: Seed | Seeds | None = None
    protocol: Protocol | list[Protocol] | None = None
    tasks: list[Task] | None = None
    examples: Examples | None = None
    dilation: Whole | list[Whole] | None = None
    local: Whole | list[Whole] | None = None
    initial: Whole | list[Whole] | None = None


@dataclass(frozen=True, kw_only=True)
class OneCell(Settings):
    name: Literal["eval", "hit_rate"]


@dataclass(frozen=True, kw_only=True)
class Grids(Settings):
    """A stage that fills grids of cells for every training of `models`.

    Subclasses declare `cells` last: it is interpolated from other fields, and of several errors the
    first field's is reported.
    """

    models: Names
    trainings: Seeds
    workers: Threads


@dataclass(frozen=True, kw_only=True)
class RandomSelector(Settings):
    name: Literal["random_selector"]
    workers: Threads
    scorer: Scorer
    selector_seeds: Seeds
    cells: dict[Name, Grid]


@dataclass(frozen=True, kw_only=True)
class Ablation(Grids):
    name: Literal["ablation"]
    scorer: Scorer
    models: Annotated[Names, Field(min_length=2)]
    methods: Annotated[Names, Field(min_length=1)]
    cells: dict[Name, Grid] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Measured(Grids):
    name: Literal["loss", "reads"]
    cells: dict[Name, Grid]


@dataclass(frozen=True, kw_only=True)
class MethodsStage(Grids):
    name: Literal["methods"]
    scorer: Scorer
    budgets: list[Fraction]
    patterns: Names
    selecting: Names
    cells: Annotated[dict[Name, Grid], AfterValidator(_not_empty)]
    random_examples: Examples


@dataclass(frozen=True, kw_only=True)
class Look(Settings):
    name: Literal["look"]
    models: Names
    methods: Annotated[Names, Field(min_length=1)]
    task: Golden
    index: Annotated[int, Field(ge=0, lt=10**6)]


@dataclass(frozen=True, kw_only=True)
class Report(Settings):
    name: Literal["report"]
    models: Names
    trainings: Seeds
    outputs: dict[Output, bool]
    scorer: Scorer
    folder: Text | None
    where: dict[Name, Any] | None  # choices by column of cells.csv


@dataclass(frozen=True, kw_only=True)
class Sweep(Report, Grids):
    name: Literal["sweep"]  # type: ignore[assignment]
    cells: Annotated[dict[Name, Grid], AfterValidator(_not_empty)]
    random_examples: Examples


@dataclass(frozen=True, kw_only=True)
class Training(Settings):
    folder: Text
    init: Text | None
    schedule: Annotated[list[Annotated[tuple[Positive, Length], OF_LIST]], Field(min_length=1)]
    tokens_per_step: Positive
    joint: DilatedSettings | None
    alternate: bool
    prefix: Literal["random", "prompt"] | None = None
    sparse_only_tokens: Whole
    low_rank: Whole = 0
    workers: Threads
    dtype: Dtype | None = None  # of the saved weights; null: as they are trained
    optimizer: TrainSettings


@dataclass(frozen=True, kw_only=True)
class Pretrain(Training):
    name: Literal["pretrain"]
    drill_tokens: Whole
    list_rate: Share
    several_rate: Share
    other_rate: Share
    styles: list[dict[str, Any]] = field(default_factory=list)  # changes of data.forms


@dataclass(frozen=True, kw_only=True)
class ContinuedPretrain(Training):
    name: Literal["continued_pretrain"]


@dataclass(frozen=True, kw_only=True)
class Sft(Training):
    name: Literal["sft"]
    mixture: dict[Task, Rate]


@dataclass(frozen=True, kw_only=True)
class Tokenize(Settings):
    name: Literal["tokenize"]
    init: Text | None
    workers: Threads


@dataclass(frozen=True, kw_only=True)
class Convert(Settings):
    name: Literal["convert"]
    tokenizer: Text | None
    dtype: Dtype | None


Stage = (
    OneCell
    | RandomSelector
    | Ablation
    | Measured
    | MethodsStage
    | Look
    | Sweep
    | Report
    | Pretrain
    | ContinuedPretrain
    | Sft
    | Tokenize
    | Convert
)

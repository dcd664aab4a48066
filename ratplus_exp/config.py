"""The typed configuration that Hydra composes, and what of it can be checked before any loading."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from hydra.core.config_store import ConfigStore
from hydra.utils import get_class
from omegaconf import MISSING, DictConfig, OmegaConf

from ratplus_exp.budget import Budget
from ratplus_exp.methods import Method
from ratplus_exp.tasks import TASKS, Forms

SELECTORS = ("topk", "random", "oracle")
TRACKING_MODES = ("online", "offline", "disabled")


@dataclass
class ModelConfig:
    """A backbone. `path` is a folder in Hugging Face's format; `training` says which training
    of the model it holds, for instance as `path: models/attention/${.training}`."""

    name: str = MISSING
    tier: str = MISSING
    backbone: str = MISSING  # attention or ratplus
    path: str = MISSING
    training: int = 0  # the seed that it was trained with, which both backbones of a pair share
    sha256: Any = None  # of model.safetensors, or one a training: {0: …, 1: …}; checked where given
    architecture: dict[str, Any] = field(default_factory=dict)  # for training and converting
    tokenizer: str | None = None  # a folder, for training from scratch; null: made of data.forms


@dataclass
class BudgetConfig:
    fraction: str = MISSING


@dataclass
class DataConfig:
    name: str = MISSING
    length: int = MISSING  # context length in tokens, answer included
    batch_size: int = 50  # prompts at a time in evaluation, unless stage.batch_size says otherwise
    block_size: int = MISSING  # the tier's block size; 64 in the paper
    window: int = MISSING  # SnapKV's observation window; 64 in the paper
    kernel: int = MISSING  # of SnapKV's pooling; 5 in the paper
    tasks: list[str] = field(default_factory=lambda: list(TASKS))
    examples: int = 100  # a task
    first_token: str = "prefill"  # what gives an answer's first token: the prefill, or "decode"
    forms: dict[str, Any] = field(default_factory=dict)
    essay: str | None = None  # a text file or RULER's PaulGrahamEssays.json; None: generated prose
    path: str | None = None  # a folder of RULER's own <task>/validation.jsonl to use instead


@dataclass
class TrackingConfig:
    mode: str = "offline"
    project: str = "ratplus_exp"
    entity: str | None = None
    group: str | None = None  # runs of one sweep


@dataclass
class ClusterConfig:
    """The GPUs that dry_run=true reckons with: one GH200 by default."""

    gpus: int = 1
    peak_tflops: float = 989.0  # of one GPU, dense bf16
    memory_gb: float = 96.0
    bandwidth_tb: float = 4.0  # TB/s of its memory
    mfu: float = 0.4  # share of the peak that is reached


@dataclass
class Config:
    """The root; `method`, `stage` and `corpus` stay open, since each file there brings its own
    fields. Only stages that read text have a corpus."""

    model: ModelConfig = field(default_factory=ModelConfig)
    method: dict[str, Any] = field(default_factory=dict)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    data: DataConfig = field(default_factory=DataConfig)
    stage: dict[str, Any] = field(default_factory=dict)
    corpus: dict[str, Any] = field(default_factory=dict)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    checkpoint: str | None = None  # stage=convert: one of P2's .pth files
    selector: str = "topk"
    selector_seed: int = 0  # of selector=random
    oracle_heads: list[str] = field(default_factory=list)  # of selector=oracle: layer-head; []: all
    seed: int = 0  # of the samples; in training, of the data and the initial weights
    device: str = "auto"  # auto: a GPU if there is one
    cuda_graphs: bool = True  # on a GPU: a decoding step is launched as one
    threads: int = 0  # of torch on a CPU; 0: one a core
    dry_run: bool = False  # print what the job would cost, and do nothing
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    output: str = "outputs"
    results: str = "${output}/results"  # the store


T = TypeVar("T")
ConfigStore.instance().store(name="schema", node=Config)


def method_of(cfg: DictConfig) -> Method:
    """The method with its sizes, the budget turned into blocks or tokens; ValueError if it can't.

    Its YAML has `name`, `target` (the class) and the class's own fields. A budget applies to
    methods that select; dense and dilated attention ignore it.
    """
    settings = plain(cfg.method)
    name, cls = settings.pop("name"), _class(settings.pop("target"))
    if settings.get("block_size") == 0:
        raise ValueError("method.block_size must be at least 1")
    method = build(cls, settings, f"method {name}")
    if cls.phase is not None and not settings.get("top_k"):
        budget = Budget.parse(cfg.budget.fraction)
        if cls.unit == "block":
            settings["top_k"] = budget.blocks(cfg.data.length, method.block_size)
        else:
            settings["top_k"] = budget.tokens(cfg.data.length)
    method = build(cls, settings, f"method {name}")
    method.validate()
    return method


def budget_name(cfg: DictConfig, method: Method) -> str:
    """The nominal budget as tables print it; "1" for dense attention."""
    return str(Budget(method.fraction(cfg.data.length)))


def expected_sha256(model: DictConfig) -> str | None:
    """The digest that model.sha256 gives this training; ValueError for a training it doesn't know.

    One digest alone is that of training 0."""
    if model.sha256 is None:
        return None
    digests = {0: model.sha256} if isinstance(model.sha256, str) else model.sha256
    if model.training not in digests:
        known = ", ".join(map(str, sorted(digests)))
        raise ValueError(
            f"model.training={model.training} is unknown: {model.name} has {known}; train another "
            "one and name it in model.sha256, or set model.sha256=null model.path=DIR"
        )
    return str(digests[model.training])


def forms_of(cfg: DictConfig, style: DictConfig | None = None) -> Forms:
    """The texts of data.forms; `style` replaces some of its fields."""
    changes = plain(style) if style is not None else {}
    where = "data.forms" if style is None else "stage.styles"
    return build(Forms, plain(cfg.data.forms) | changes, where)


def validate(cfg: DictConfig) -> None:
    """Everything that can be wrong in the words alone; ValueError with the remedy, in one line."""
    _one_of("selector", cfg.selector, SELECTORS)
    _one_of("tracking.mode", cfg.tracking.mode, TRACKING_MODES)
    _one_of("model.backbone", cfg.model.backbone, ("attention", "ratplus"))
    if not cfg.data.tasks:
        raise ValueError(f"data.tasks is empty: use some of {', '.join(TASKS)}")
    for task in cfg.data.tasks:
        _one_of("data.tasks", task, tuple(TASKS))
    for name, value, least in (
        ("data.examples", cfg.data.examples, 1),
        ("data.length", cfg.data.length, 2),
        ("data.block_size", cfg.data.block_size, 1),
        ("data.window", cfg.data.window, 1),
        ("threads", cfg.threads, 0),
        ("stage.batch_size", cfg.stage.get("batch_size", 1), 1),
        ("stage.workers", cfg.stage.get("workers", 0), 0),
        ("seed", cfg.seed, 0),
        ("model.training", cfg.model.training, 0),
        ("selector_seed", cfg.selector_seed, 0),
        ("cluster.gpus", cfg.cluster.gpus, 1),
    ):
        if value < least:
            raise ValueError(f"{name}={value} is too small: use at least {least}")
    _one_of("stage.first_token", cfg.stage.get("first_token", "prefill"), ("prefill", "decode"))
    forms_of(cfg)
    oracle_heads(cfg)


def oracle_heads(cfg: DictConfig) -> tuple[tuple[int, int], ...]:
    """(layer, head) of oracle_heads, in order; ValueError where they can't be meant."""
    if cfg.oracle_heads and cfg.selector != "oracle":
        raise ValueError(f"oracle_heads needs selector=oracle, not {cfg.selector}")
    heads = set()
    for name in cfg.oracle_heads:
        layer, dash, head = name.partition("-")
        if not (dash and layer.isdecimal() and head.isdecimal()):
            raise ValueError(f"oracle_heads: {name} is no head: write layer-head, as in [1-0,1-3]")
        heads.add((int(layer), int(head)))
    return tuple(sorted(heads))


def validate_method(cfg: DictConfig) -> Method:
    """The method, if it, its budget, its selector and the prompts' length fit together."""
    method = method_of(cfg)
    reserve = forms_of(cfg).reserve
    prompt = cfg.data.length - reserve
    if method.phase == "once" and prompt < method.forced:
        raise ValueError(
            f"prompts of {prompt} tokens (data.length {cfg.data.length} less the {reserve} of "
            f"data.forms.reserve) are shorter than the observation window of {method.forced}: "
            "raise data.length or lower method.window"
        )
    if cfg.selector != "topk" and method.phase is None:
        raise ValueError(
            f"selector={cfg.selector} needs a method that selects, not {cfg.method.name}"
        )
    return method


def build(cls: type[T], settings: dict[str, Any], where: str) -> T:
    """A dataclass from a mapping; ValueError for a field that it lacks or of another type."""
    hints = get_type_hints(cls)
    known = [f.name for f in fields(cls)]  # type: ignore[arg-type]
    for name, value in settings.items():
        if name not in known:
            raise ValueError(f"{where} has no field {name!r}: use one of {', '.join(known)}")
        if not _fits(value, hints[name]):
            kind = getattr(hints[name], "__name__", None) or str(hints[name])
            kind = {"int": "a whole number", "float": "a number"}.get(kind, kind)
            raise ValueError(f"{where}: {name} must be {kind}, got {value!r}")
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()})


def _fits(value: Any, hint: Any) -> bool:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, arg) for arg in args)
    if origin is Literal:
        return value in args
    if origin is tuple:
        return isinstance(value, list | tuple) and all(
            _fits(x, a) for x, a in zip(value, args, strict=False)
        )
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _class(target: str) -> type[Method]:
    try:
        cls = get_class(target)
    except Exception:  # hydra raises several kinds, each over many lines
        cls = object
    if not issubclass(cls, Method):
        raise ValueError(f"method.target={target} is no Method: see CONTRIBUTING.md")
    return cls


def plain(cfg: Any) -> dict[str, Any]:
    """A configuration as a plain, resolved dict."""
    container = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value} is unknown: use one of {', '.join(choices)}")

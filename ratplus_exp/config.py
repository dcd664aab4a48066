"""The configuration that Hydra composes, and its validation.

Stages read the composed DictConfig. `validate` reports errors without delay: it imports torch for
the method's class alone, after everything else is valid, and never transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue

from ratplus_exp.budget import Budget
from ratplus_exp.schema import Config, LayersSettings, MethodConfig
from ratplus_exp.settings import build
from ratplus_exp.stage_schema import Convert, Pretrain, Sft, Training
from ratplus_exp.tasks import GOLDEN, Forms, Others

if TYPE_CHECKING:
    from ratplus_exp.methods import Method

CONF = Path(__file__).parent / "conf"  # a link to the checkout's conf/; in a wheel, a copy
COMMON = [field.name for field in fields(MethodConfig)]

ConfigStore.instance().store(name="schema", node=asdict(Config()))


def validate(cfg: DictConfig) -> None:
    """ValueError, in one line with the remedy, for anything wrong in the configuration itself."""
    try:
        settings: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        raise ValueError(f"{error.full_key} is missing: set {error.full_key}=…") from None
    check(settings)


def check(settings: Mapping[str, Any]) -> Config:
    """`validate` of a plain, resolved configuration, typed."""
    config = build(Config, settings)
    if "layers" in config.method:
        build(LayersSettings, config.method, "method")
    methods = by_layer(config.method)
    for method in methods:
        build(MethodConfig, {x: method[x] for x in COMMON if x in method}, "method")
    for style in config.stage.styles if isinstance(config.stage, Pretrain) else ():
        build(Forms, settings["data"]["forms"] | style, "stage.styles")
    if isinstance(config.stage, Training) and config.stage.low_rank and not config.stage.init:
        raise ValueError("stage.low_rank freezes a trained model: set stage.init to its folder")
    if isinstance(config.stage, Sft) and not any(config.stage.mixture.values()):
        raise ValueError("stage.mixture is empty or all 0: give some task a positive weight")
    if config.oracle_heads and config.selector != "oracle":
        raise ValueError(f"oracle_heads needs selector=oracle, not {config.selector}")
    if config.stage.name == "loss" and config.selector == "oracle":
        raise ValueError("stage=loss has no gold values: use selector=topk or random")
    golden = config.stage.name in ("hit_rate", "reads") or config.selector == "oracle"
    if golden and (placeless := [task for task in config.data.tasks if task not in GOLDEN]):
        raise ValueError(
            f"data.tasks has {placeless[0]}, whose answer has no position in the prompt, so no hit "
            "rate, no reads and no oracle: leave it out"
        )
    if config.checkpoint and not isinstance(config.stage, Convert):
        raise ValueError("checkpoint is for stage=convert: set model.path to evaluate a model")
    for method in methods:
        _method(method)
        _own_name(method)
    return config


def _method(settings: Mapping[str, Any]) -> Method:
    sizes = {name: value for name, value in settings.items() if name not in COMMON}
    return build(_class(settings["target"]), sizes, "method")


def _named(method: Mapping[str, Any]) -> str | None:
    """The class of a method's name in conf/method."""
    file = CONF / "method" / f"{method.get('name')}.yaml"
    return OmegaConf.select(OmegaConf.load(file), "target") if file.is_file() else None


def unnamed_classes(cfg: DictConfig) -> list[str]:
    """The classes of methods whose name is not in conf/method: another class may take the name."""
    return [x["target"] for x in by_layer(plain(cfg.method)) if not _named(x)]


def _own_name(method: Mapping[str, Any]) -> None:
    """ValueError for a class under the name of another one in conf/method, since results are stored
    under the name."""
    target = _named(method)
    if target and _class(target) is not _class(method["target"]):
        raise ValueError(
            f"method.name={method['name']} is {target}: name {method.get('target')} otherwise, "
            "as in method.name=mine"
        )


def by_layer(method: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The settings of each layer's method: of method=layers those that it names, and where fields
    are lists, one entry a layer; otherwise one of all layers."""
    if "layers" in method:
        known = method.get("methods", {})
        if unknown := [name for name in method["layers"] if name not in known]:
            raise ValueError(f"method.layers has {unknown[0]}: use {', '.join(known)}, or add it")
        return [known[name] for name in method["layers"]]
    lists = {name: value for name, value in method.items() if isinstance(value, list)}
    if len(counts := {len(value) for value in lists.values()} or {1}) > 1 or 0 in counts:
        raise ValueError(f"method.{' and '.join(lists)}: list one entry a layer in each")
    entries = range(counts.pop())
    return [{**method, **{name: value[i] for name, value in lists.items()}} for i in entries]


def method_of(cfg: DictConfig) -> Method:
    """The method with its sizes, of which the budget gives top_k for methods that select;
    ValueError if they do not fit. Its YAML has `name`, `target` (the class) and the class's fields.
    """
    settings = by_layer(whole := plain(cfg.method))
    if settings == [whole]:
        return _one_method(cfg, whole)
    from ratplus_exp.methods import Layers

    methods = tuple(_one_method(cfg, layer) for layer in settings)
    return Layers(layers=methods, names=tuple(layer["name"] for layer in settings))


def _one_method(cfg: DictConfig, settings: dict[str, Any]) -> Method:
    method = _method(settings)
    if not settings.get("top_k"):
        method = method.with_budget(Budget.parse(cfg.budget), cfg.data.length)
    method.validate()
    length = cfg.data.length
    of_first = method.k(0, 2) * method.block_size  # where layers differ, the first has the most
    if (most := max(of_first, method.fraction(length) * length)) > length:
        size = "method.top_k" if settings.get("top_k") else "the budget"
        raise ValueError(f"{most} of {length} tokens cannot be selected: lower {size}")
    if cfg.selector == "oracle" and method.phase == "prefill" and method.unit == "token":
        raise ValueError(
            f"selector=oracle is for positions, but {settings['name']} selects distances, too: use "
            "topk or random"
        )
    return method


def expected_sha256(model: DictConfig) -> str | None:
    """The digest of this training in model.sha256, where a single digest is that of training 0;
    ValueError if it has none."""
    if model.sha256 is None:
        return None
    digests = {0: model.sha256} if isinstance(model.sha256, str) else model.sha256
    if model.training not in digests:
        trainings = ", ".join(map(str, sorted(digests)))
        raise ValueError(
            f"model.training={model.training} is unknown: {model.name} has {trainings}; add its "
            "digest to model.sha256, or set model.sha256=null model.path=DIR"
        )
    return str(digests[model.training])


def forms_of(cfg: DictConfig) -> Forms:
    """The texts of data.forms."""
    return build(Forms, plain(cfg.data.forms), "data.forms")


def others_of(cfg: DictConfig) -> Others:
    """The texts of data.vt, cwe, fwe and qa."""
    names = (field.name for field in fields(Others))
    return build(Others, {name: plain(cfg.data[name]) for name in names}, "data")


def texts_of(cfg: DictConfig, task: str) -> Any:
    """The texts of a task, with its `template` and `reserve`."""
    return others_of(cfg).of(task, forms_of(cfg))


def rope_of(cfg: DictConfig) -> dict[str, Any] | None:
    """The changes of a model's rope_parameters."""
    return plain(cfg.rope) if cfg.rope else None


def oracle_heads(cfg: DictConfig) -> tuple[tuple[int, int], ...]:
    """(layer, head) of oracle_heads, in order."""
    pairs = (name.split("-") for name in cfg.oracle_heads)
    return tuple(sorted((int(layer), int(head)) for layer, head in pairs))


def validate_method(cfg: DictConfig) -> Method:
    """The method, after checks of budget, selector and prompt length."""
    method = method_of(cfg)
    reserve = max(texts_of(cfg, task).reserve for task in cfg.data.tasks)
    prompt = cfg.data.length - reserve
    if method.phase in ("once", "step") and prompt < method.forced:
        raise ValueError(
            f"prompts of {prompt} tokens (data.length {cfg.data.length} less the {reserve} of "
            f"reserve) are shorter than the observation window of {method.forced}: "
            "raise data.length or lower method.window"
        )
    if cfg.selector != "topk" and method.phase is None:
        raise ValueError(
            f"selector={cfg.selector} needs a method that selects, not {cfg.method.name}: "
            "use quest, moba or snapkv"
        )
    return method


def _class(target: str) -> type[Method]:
    from ratplus_exp.methods import Method

    try:
        cls = get_class(target)
    except Exception:  # hydra raises several kinds, each over many lines
        cls = object
    if not issubclass(cls, Method):
        raise ValueError(f"method.target={target} is no Method: see CONTRIBUTING.md")
    return cls


def command_line_fields(group: str) -> list[str]:
    """The fields of a group, as in "model.architecture", that the command line sets."""
    fields: list[str] = []
    parser = OverridesParser.create()
    for override in parser.parse_overrides(list(HydraConfig.get().overrides.task)):
        name = override.key_or_group
        if name.startswith(f"{group}."):
            fields.append(name.removeprefix(f"{group}."))
        elif name == group and isinstance(value := override.value(), dict):
            fields += map(str, value)
    return fields


def plain(cfg: Any) -> dict[str, Any]:
    """A configuration as a plain, resolved dict."""
    container = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}

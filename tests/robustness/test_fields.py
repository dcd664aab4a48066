"""Every field of every configuration, from its annotation: what breaks its type or its bounds is
refused in one line that names it. A field added later is among them."""

import copy
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import get_class
from omegaconf import OmegaConf

from ratplus_exp.config import check
from ratplus_exp.schema import Config, LayersSettings

CONF = Path(__file__).parents[2] / "conf"
STAGES = {
    "ablation": ["experiment=small_ablation"],
    "continued_pretrain": ["stage=continued_pretrain"],
    "convert": ["stage=convert"],
    "eval": [],
    "hit_rate": ["stage=hit_rate"],
    "look": ["stage=look"],
    "loss": ["stage=loss"],
    "methods": ["experiment=methods"],
    "pretrain": ["experiment=small_ratplus"],
    "random_selector": ["stage=random_selector"],
    "reads": ["stage=reads"],
    "report": ["stage=report"],
    "sft": ["stage=sft"],
    "sweep": ["experiment=table5"],
    "tokenize": ["stage=tokenize"],
}
SAMPLES = {  # a value of each type that YAML has
    bool: [True],
    int: [3],
    float: [2.5],
    str: ["x"],
    list: [[[]], [{}]],
    dict: [{"colour": 1}],
    type(None): [None],
}
OPEN = {"where", "styles", "rope_parameters"}  # mappings whose fields other parts know


@cache
def base(stage, method="quest"):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", [*STAGES[stage], f"method={method}"])
    return OmegaConf.to_container(cfg, resolve=True)


def alternatives(hint):
    """The types of a hint without their annotations, each with those that apply to it."""
    if get_origin(hint) is Annotated:
        inner, *notes = get_args(hint)
        return [(kind, [*more, *notes]) for kind, more in alternatives(inner)]
    if get_origin(hint) is Union or type(hint).__name__ == "UnionType":
        return [found for arg in get_args(hint) for found in alternatives(arg)]
    return [(hint, [])]


def bounds(notes):
    flat = [m for note in notes for m in (note, *getattr(note, "metadata", ()))]
    return {
        name: getattr(note, name)
        for note in flat
        for name in ("ge", "gt", "le", "lt", "min_length")
        if getattr(note, name, None) is not None
    }


def wrong_values(hint):
    """Values that a hint can't mean: other types, and beyond every bound. Numbers and text without
    bounds would take the largest of them, and so fail the test."""
    kinds = alternatives(hint)
    origins = [get_origin(kind) or kind for kind, _ in kinds]
    taken = set()
    for kind in origins:
        taken |= {float: {float, int}, tuple: {list}}.get(kind, {kind})
        if kind is Literal:
            taken.add(str)
        if isinstance(kind, type) and is_dataclass(kind):
            taken.add(dict)
    values = [v for kind, samples in SAMPLES.items() if kind not in taken for v in samples]
    numbers = [(kind, bounds(notes)) for kind, notes in kinds if kind in (int, float)]
    if numbers:
        values += [-(10**30), 10**30, float("nan"), float("inf"), -1e300, 1e300]
    if len(numbers) == 1 and str not in taken:
        kind, limits = numbers[0]
        step = 1 if kind is int else 1e-6
        values += [limits["ge"] - step] if "ge" in limits else []
        values += [limits["le"] + step * max(1, limits["le"])] if "le" in limits else []
        values += [limits[name] for name in ("gt", "lt") if name in limits]
    if str in taken:
        values += ["x" * 200_000, "\0"] if not free_text(kinds) else ["x" * 200_000]
        values += [] if free_text(kinds) else ["", " ", "two\nlines"]
    if Literal in origins:
        values += ["nonsense"]
    if list in origins or tuple in origins:
        values += [[["deep"]], [None]]
    if any(limits.get("min_length") for limits in (bounds(notes) for _, notes in kinds)):
        values += [[], {}]
    return values


def free_text(kinds):
    return any(kind is str and not any(hasattr(n, "func") for n in notes) for kind, notes in kinds)


def leaves(cls, settings, path=()):
    """(path, hint) of every field below a settings class, as the composed settings have it."""
    hints = get_type_hints(cls, include_extras=True)
    for field in fields(cls):
        hint, where = hints[field.name], (*path, field.name)
        if field.name in OPEN or hint == dict[str, Any]:
            continue
        yield where, hint
        value = settings.get(field.name) if isinstance(settings, dict) else None
        for kind, _ in alternatives(hint):
            if is_dataclass(kind):
                named = get_type_hints(kind).get("name")
                tags = get_args(named) if get_origin(named) is Literal else ()
                if not tags or (value or {}).get("name") in tags:
                    yield from leaves(kind, value or {}, where)
            elif get_origin(kind) is dict and is_dataclass(get_args(kind)[1]):
                for name, entry in (value or {}).items():
                    yield from leaves(get_args(kind)[1], entry, (*where, name))


def put(settings, path, value):
    changed = copy.deepcopy(settings)
    inner = changed
    for name in path[:-1]:
        inner[name] = inner.get(name) or {}
        inner = inner[name]
    inner[path[-1]] = value
    return changed


def refusal(settings):
    with pytest.raises(ValueError) as error:
        check(settings)
    return str(error.value)


def check_refused(settings, places):
    count = 0
    for path, hint in places:
        for value in wrong_values(hint):
            try:
                check(put(settings, path, value))
            except ValueError as error:
                message = str(error)
            else:
                pytest.fail(f"{'.'.join(path)}={str(value)[:60]!r} was taken")
            assert "\n" not in message and len(message) < 1000, message[:200]
            assert any(name in message for name in path[-2:]), (path, value, message)
            assert "pydantic" not in message and "Input should" not in message, message
            count += 1
    return count


@pytest.mark.parametrize("stage", STAGES)
def test_no_field_takes_what_it_cannot_mean(stage):
    settings = base(stage)
    check(settings)
    parts = leaves(Config, settings)
    if stage != "eval":  # the rest is the same for all
        parts = ((path, hint) for path, hint in parts if path[0] in ("stage", "corpus"))
    assert check_refused(settings, parts) > (500 if stage == "eval" else 10)


@pytest.mark.parametrize("name", [path.stem for path in (CONF / "method").glob("*.yaml")])
def test_no_method_is_made_of_what_it_cannot_mean(name):
    settings = base("eval", name)
    check(settings)
    cls = LayersSettings if name == "layers" else get_class(settings["method"]["target"])
    places = [(("method", *path), hint) for path, hint in leaves(cls, settings["method"])]
    count = check_refused(settings, places)
    assert count > 5 * len(places) > 0


def test_every_stage_is_checked():
    assert STAGES.keys() == {path.stem for path in (CONF / "stage").glob("*.yaml")}


@pytest.mark.parametrize("stage", STAGES)
def test_unknown_fields_are_refused(stage):
    settings = base(stage)
    nodes = {path[:-1] for path, _ in leaves(Config, settings)} | {("method",)}
    for path in nodes:
        message = refusal(put(settings, (*path, "colour"), "red"))
        assert "'colour'" in message and ("use one of" in message or "it has none" in message)

"""RULER's tasks: samples, haystacks, tokenizers, RULER's files, and the two scores."""

from ratplus_exp.tasks.forms import Forms
from ratplus_exp.tasks.niah import GOLDEN, RULER_NAMES, SPLITS, TASKS, split_of
from ratplus_exp.tasks.prose import paragraph
from ratplus_exp.tasks.ruler import Others, Ruler
from ratplus_exp.tasks.sample import Sample, read_jsonl, target, target_ids
from ratplus_exp.tasks.scoring import exact, substring
from ratplus_exp.tasks.tokenizer import pocket_tokenizer

__all__ = [
    "GOLDEN",
    "RULER_NAMES",
    "SPLITS",
    "TASKS",
    "Forms",
    "Others",
    "Ruler",
    "Sample",
    "paragraph",
    "pocket_tokenizer",
    "read_jsonl",
    "exact",
    "substring",
    "split_of",
    "target",
    "target_ids",
]

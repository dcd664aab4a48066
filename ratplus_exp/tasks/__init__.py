"""RULER's tasks: samples, haystacks, tokenizers, RULER's files, and the two scores."""

from ratplus_exp.tasks.forms import Forms
from ratplus_exp.tasks.niah import GOLDEN, RULER_NAMES, TASKS
from ratplus_exp.tasks.ruler import Others, Ruler
from ratplus_exp.tasks.sample import Sample, read_jsonl
from ratplus_exp.tasks.scoring import exact, substring
from ratplus_exp.tasks.tokenizer import pocket_tokenizer

__all__ = [
    "GOLDEN",
    "RULER_NAMES",
    "TASKS",
    "Forms",
    "Others",
    "Ruler",
    "Sample",
    "pocket_tokenizer",
    "read_jsonl",
    "exact",
    "substring",
]

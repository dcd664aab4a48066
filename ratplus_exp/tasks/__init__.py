"""RULER's tasks: samples, haystacks, tokenizers, RULER's files, and the two scores."""

from ratplus_exp.tasks.forms import Forms
from ratplus_exp.tasks.niah import NIAH, SPLITS, TASKS, TaskSpec, split_of
from ratplus_exp.tasks.prose import paragraph, sentence
from ratplus_exp.tasks.ruler import read_jsonl, write_jsonl
from ratplus_exp.tasks.sample import Sample, target, target_ids
from ratplus_exp.tasks.scoring import exact, substring
from ratplus_exp.tasks.source import GOLDEN, RULER_NAMES, Others, Ruler
from ratplus_exp.tasks.tokenizer import pocket_tokenizer

__all__ = [
    "GOLDEN",
    "NIAH",
    "RULER_NAMES",
    "SPLITS",
    "TASKS",
    "Forms",
    "Others",
    "Ruler",
    "Sample",
    "TaskSpec",
    "paragraph",
    "pocket_tokenizer",
    "read_jsonl",
    "exact",
    "substring",
    "sentence",
    "split_of",
    "target",
    "target_ids",
    "write_jsonl",
]

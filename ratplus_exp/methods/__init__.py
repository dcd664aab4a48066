"""Query-aware sparse methods: one file each, on one engine (Eq. 3 and 4 of P1)."""

from ratplus_exp.methods.base import BlockMethod, Dense, Method
from ratplus_exp.methods.dilated import Dilated
from ratplus_exp.methods.engine import Engine
from ratplus_exp.methods.layers import Layers
from ratplus_exp.methods.moba import MoBA
from ratplus_exp.methods.quest import Quest
from ratplus_exp.methods.selectors import Oracle, Random, Selector, TopK
from ratplus_exp.methods.snapkv import SnapKV
from ratplus_exp.methods.states import States, Step
from ratplus_exp.methods.usage import Usage

__all__ = [
    "BlockMethod",
    "Dense",
    "Dilated",
    "Engine",
    "Layers",
    "Method",
    "MoBA",
    "Oracle",
    "Quest",
    "Random",
    "Selector",
    "SnapKV",
    "States",
    "Step",
    "TopK",
    "Usage",
]

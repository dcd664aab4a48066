"""Backbones as Hugging Face models; importing this package registers them with the Auto classes.

A model comes from a folder (`loading.load_model`), a configuration (`config_for`, `new_model`), a
trained attention model (`add_memory`), any model of transformers (`attach_engine`), or one of P2's
checkpoints (`p2_checkpoint.from_p2`).
"""

from ratplus_exp.models.building import add_memory, config_for, new_model
from ratplus_exp.models.cache import SparseCache
from ratplus_exp.models.configuration import RatPlusConfig
from ratplus_exp.models.families import FAMILIES
from ratplus_exp.models.hf import attach_engine
from ratplus_exp.models.modeling import RatPlusForCausalLM, RatPlusModel

__all__ = [
    "RatPlusConfig",
    "RatPlusForCausalLM",
    "RatPlusModel",
    "SparseCache",
    "add_memory",
    "attach_engine",
    "config_for",
    "new_model",
    "FAMILIES",
]

# Saved models import their classes by name, such as Olmo2RatPlusConfig, from this module.
for _causal in FAMILIES.values():
    for _class in (_causal, _causal.decoder_class, _causal.config_class):
        globals()[_class.__name__] = _class

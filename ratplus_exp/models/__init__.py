"""Backbones as Hugging Face models; importing this package registers them with the Auto classes."""

from ratplus_exp.models.cache import SparseCache
from ratplus_exp.models.configuration import RatPlusConfig
from ratplus_exp.models.modeling import RatPlusForCausalLM, RatPlusModel

__all__ = ["RatPlusConfig", "RatPlusForCausalLM", "RatPlusModel", "SparseCache"]

"""Needs the package ratplus_exp."""

from ratplus_exp.models import RatPlusConfig, RatPlusForCausalLM, RatPlusModel

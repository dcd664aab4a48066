"""The stages of `run.py`: each a function of the composed configuration."""

from ratplus_exp.stages.common import run

__all__ = ["run"]

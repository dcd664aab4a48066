"""docs/methods.md is what the classes say, and every method is tested and names its source."""

import re

from hydra.utils import get_class
from omegaconf import OmegaConf
from test_methods import METHODS

from ratplus_exp.methods import Layers
from ratplus_exp.methods.__main__ import CONF, PAGE, page


def test_the_committed_page_is_up_to_date():
    assert PAGE.read_text() == page(), "run python -m ratplus_exp.methods"


def test_every_method_is_tested_and_names_a_paper():
    classes = {get_class(OmegaConf.load(file).target) for file in CONF.glob("*.yaml")}
    assert classes - {Layers} == {type(method) for method in METHODS}
    for cls in classes:
        assert re.search(r", 20\d\d, arXiv \d{4}\.\d{5}|none: the upper bound", cls.paper), cls

"""Samples made ahead or kept from another setting are those that would be made now."""

from concurrent.futures.process import BrokenProcessPool

import pytest

from ratplus_exp.tasks import Forms, Ruler, pocket_tokenizer
from ratplus_exp.tasks import prompts as module
from ratplus_exp.tasks.prompts import Prompts, prompts_of

FORMS = Forms(lowercase=True, key_words="noun", uuid="hex", number_digits=4, reserve=48)
NAMES = [("S-1", 0), ("MK-2", 3), ("MV", 1)]


@pytest.fixture
def niah():
    return Ruler(pocket_tokenizer(FORMS), 192, FORMS)


@pytest.fixture
def made_here(monkeypatch):
    names, make = [], Ruler.sample
    monkeypatch.setattr(
        Ruler, "sample", lambda self, *name: [names.append(name), make(self, *name)][1]
    )
    return names


def test_samples_made_ahead_are_the_same(niah, makers_are_threads):
    prompts = Prompts(niah, 7, workers=2)
    for task, index in NAMES:
        prompts.prefetch(task, [index, index + 1])
    for task, index in NAMES:
        assert prompts(task, index) == niah.sample(task, 7, index)
        assert prompts(task, index) is prompts(task, index)


@pytest.mark.slow
def test_processes_make_the_same_samples(niah):
    prompts = Prompts(niah, 7, workers=1)
    for task, index in NAMES:
        prompts.prefetch(task, [index])
    assert prompts.pool is not None
    for task, index in NAMES:
        assert prompts(task, index) == niah.sample(task, 7, index)
    with pytest.raises(ValueError, match="unknown task"):
        prompts.prefetch("nothing", [0])
        prompts("nothing", 0)
    prompts.pool.shutdown()


def test_a_killed_workers_samples_are_made_here(niah, monkeypatch, makers_are_threads):
    def killed(*_):
        raise BrokenProcessPool

    monkeypatch.setattr(module.Workers, "call", lambda self, *_: self.submit(killed))
    prompts = Prompts(niah, 7, workers=1)
    prompts.prefetch("S-1", [0, 1])
    assert prompts("S-1", 0) == niah.sample("S-1", 7, 0)
    assert prompts("S-1", 1) == niah.sample("S-1", 7, 1)
    prompts.prefetch("S-1", [2])
    assert len(prompts.samples) == 2


def test_settings_with_the_same_prompts_share_them(niah, made_here):
    prompts_of(niah, 0)("S-1", 0)
    again = Ruler(pocket_tokenizer(FORMS), 192, FORMS)
    prompts_of(again, 0)("S-1", 0)
    assert len(made_here) == 1
    for other, seed in ((again, 1), (Ruler(again.tokenizer, 160, FORMS), 1)):
        prompts_of(other, seed)("S-1", 0)
    assert len(made_here) == 3

"""Trainings of a few steps on random tokens, and one that is killed on the way."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import yaml

from ratplus_exp.memory import Memory
from ratplus_exp.methods import Dilated
from ratplus_exp.settings import build
from ratplus_exp.training.loop import Trainer
from ratplus_exp.training.settings import Schedule, TrainSettings

TRAINING = Path(__file__).parents[2] / "conf/stage/common/training.yaml"
ADAMW = yaml.safe_load(TRAINING.read_text())["optimizer"]
DILATED = Dilated(dilation=4)
SCHEDULE = Schedule([(6 * 48, 12), (4 * 48, 16)], 48)  # 6 steps of 4 × 12 tokens, 4 of 3 × 16
ONE_STEP = Schedule([(48, 12)], 48)
SHORT = Schedule([(48, 12), (48, 16)], 48)  # a step at each length


def batch(step, rows, length):
    """Random tokens; about half of the labels are ignored, unevenly over the rows."""
    generator = np.random.default_rng((7, step))
    ids = generator.integers(1, 29, (rows, length + 1))
    ignored = generator.random((rows, length)) < np.linspace(0.1, 0.9, rows)[:, None]
    return ids[:, :-1], np.where(ignored, -100, ids[:, 1:])


def settings(**changed):
    """Those of conf/stage/common with others for a few steps, in fp32."""
    few = {"lr": 3e-3, "memory_lr": 1e-2, "warmup": 0.02, "log_every": 1, "checkpoint_every": 4}
    return build(TrainSettings, ADAMW | few | {"precision": "fp32"} | changed)


def train(model, folder, schedule=SCHEDULE, data=batch, sparse=None, trainer=Trainer, **changed):
    """The trainer after its run, and the rows it logged."""
    rows = []
    run = trainer(model, data, schedule, settings(**changed), folder, sparse, log=rows.append)
    run.run()
    return run, rows


def memory_parameters(model):
    return [p for m in model.modules() if isinstance(m, Memory) for p in m.parameters()]


class Killed(Trainer):
    """Stops, as by Ctrl-C, in the middle of its eighth step."""

    def _train_step(self, micro_batches):
        if self.step == 7:
            raise KeyboardInterrupt
        return super()._train_step(micro_batches)


def killed_data(step, rows, length):
    if step == 7:
        raise KeyboardInterrupt
    return batch(step, rows, length)

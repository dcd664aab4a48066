"""One process of a test's training: python worker.py FOLDER SETTINGS, ranks from the environment.

Trains a tiny model, and on rank 0 saves its weights in FOLDER/final.pt.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import torch
from tiny_trainings import DILATED, batch, settings

from ratplus_exp.distributed import process_group, rank
from ratplus_exp.models import RatPlusConfig, RatPlusForCausalLM
from ratplus_exp.training.loop import Stopped, Trainer
from ratplus_exp.training.parallel import whole_state_dict
from ratplus_exp.training.settings import Schedule

SCHEDULE = Schedule([(10 * 48, 12)], 48)  # 10 steps of 4 × 12 tokens


def model():
    torch.manual_seed(0)
    config = RatPlusConfig(
        vocab_size=29,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.3,
        gate_bias=(1.5, 8.0),
    )
    return RatPlusForCausalLM(config).float()


class Interrupted(Trainer):
    """One rank gets a signal before step `at`: SIGKILL ends it, SIGTERM asks to stop."""

    signal_rank, at, number = -1, -1, signal.SIGKILL

    def _train_step(self, micro_batches):
        if self.step == self.at and rank() == self.signal_rank:
            os.kill(os.getpid(), self.number)
        return super()._train_step(micro_batches)


def main(folder: Path, how: dict) -> None:
    torch.set_num_threads(1)
    interrupt = how.pop("interrupt", None)
    if interrupt:
        Interrupted.signal_rank, Interrupted.at, name = interrupt
        Interrupted.number = signal.Signals[name]
    sparse = DILATED if how.pop("joint", False) else None
    with process_group(torch.device("cpu")):
        net = model()
        trainer = Interrupted(net, batch, SCHEDULE, settings(**how), folder, sparse)
        try:
            trainer.run()
        except Stopped as stopped:
            print(stopped)
            sys.exit(3)
        weights = whole_state_dict(net)
        if rank() == 0:
            torch.save(weights, folder / "final.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))

"""Greedy decoding of a batch in steps of one shape, which a GPU replays as a CUDA graph.

A step of a small model is some hundred kernels of a few microseconds each, which take far longer to
launch one by one than to run. `model.generate` works as well, without graphs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ratplus_exp.methods import Engine
from ratplus_exp.models.cache import SparseCache
from ratplus_exp.models.prefill import PromptBatch

Run = Callable[[], None]
Capture = Callable[[Run], Run | None]


class CudaGraphs:
    """A `capture` for `greedy`: steps of the current GPU, as one launch each.

    The last graph stays until the next one has taken over its memory: the memory of a graph that is
    gone is of no use to anything else until PyTorch runs out of memory or empties its cache. That
    is what `torch.cuda.graph` does before each graph, and takes longer than the steps of an answer.
    """

    def __init__(self) -> None:
        self.last: torch.cuda.CUDAGraph | None = None
        self.usable = True

    @cached_property
    def stream(self) -> torch.cuda.Stream:
        """One for all graphs, since matrix products keep a workspace for every stream they saw."""
        return torch.cuda.Stream()

    def __call__(self, step: Run) -> Run | None:
        """Records what `step` launches, without running it. None, and a warning, if that fails:
        after a failed capture PyTorch may be unfit for another."""
        if not self.usable:
            return None
        graph = torch.cuda.CUDAGraph()
        self.stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(self.stream):
                graph.capture_begin(pool=None if self.last is None else self.last.pool())
                try:
                    step()
                finally:
                    graph.capture_end()
        except RuntimeError as problem:
            self.usable = False
            cause = str(problem.__context__ or problem).split("\n")[0]
            warnings.warn(f"decoding without CUDA graphs, which is slower: {cause}", stacklevel=2)
            return None
        self.last = graph
        return graph.replay


cuda_graphs = CudaGraphs()
"""Those of this process."""


@torch.inference_mode()
def greedy(
    prompts: PromptBatch,
    engine: Engine,
    max_new_tokens: int,
    *,
    eos: Sequence[int],
    pad: int,
    capture: Capture | None = None,
) -> Tensor:
    """Answers (B, at most max_new_tokens) to prompts, `pad` behind each one's first of `eos`.

    Args:
        capture: turns a step into a function that takes it again and again in the same memory:
            `cuda_graphs` on a GPU. None, or None in return: every step is run as the first one.
    """
    assert capture is None or engine.recorder is None, "a replayed step records nothing"
    cache = prompts.model.new_cache(engine, room=max_new_tokens + prompts.fed)
    step = _Step(prompts.model, cache, prompts.ids[:, -1:], eos, pad)
    logits = prompts.prefill(cache)
    if prompts.fed:
        fed = prompts.ids[:, -prompts.fed :]
        logits = prompts.model(fed, past_key_values=cache, logits_to_keep=1).logits
    step.choose(logits)
    tokens = [step.token.clone()]
    while len(tokens) < max_new_tokens and not bool(step.ended.all()):
        # Once a step has been run, all kernels are compiled and loaded, and all memory is there.
        if len(tokens) == 2 and capture is not None:
            step.record(capture)
        step.take()
        tokens.append(step.token.clone())
    return torch.cat(tokens, dim=1)


class _Step:
    """A decoding step of a batch: it feeds `token` (B, 1) and puts the next one in its place."""

    def __init__(
        self, model: Any, cache: SparseCache, token: Tensor, eos: Sequence[int], pad: int
    ) -> None:
        self.model, self.cache, self.pad = model, cache, pad
        self.token, self.eos = token.clone(), token.new_tensor(eos)
        self.ended = torch.zeros(len(token), dtype=torch.bool, device=token.device)
        self.replay: Run | None = None
        self.used: list[Tensor] = []  # what a replay adds to the engine's usage

    def run(self) -> None:
        self.choose(self.model(self.token, past_key_values=self.cache).logits)

    def choose(self, logits: Tensor) -> None:
        """The likeliest token by the last of logits (B, ·, V)."""
        new = logits[:, -1].argmax(-1).masked_fill(self.ended, self.pad)
        self.ended |= (new[:, None] == self.eos).any(1)
        self.token.copy_(new[:, None])

    def take(self) -> None:
        """`run`, or its replay."""
        if self.replay is None:
            self.run()
            return
        self.replay()
        self.cache.seen += 1
        if self.used:
            self.cache.engine.usage.add(*(x.clone() for x in self.used))

    def record(self, capture: Capture) -> None:
        """From now on `take` replays, if this step can be captured."""
        cache, usage = self.cache, self.cache.engine.usage
        seen, lists = cache.seen, (usage.attended, usage.positions, usage.choosing)
        counted = len(usage.attended)

        def run() -> None:
            self.run()
            if len(usage.attended) > counted:
                self.used = [torch.cat(each[counted:], 1) for each in lists]

        self.replay = capture(run)
        # What was counted has yet to happen.
        cache.seen = seen
        for each in lists:
            del each[counted:]

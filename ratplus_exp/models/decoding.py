"""Greedy decoding of a batch in steps of one shape, which a GPU replays as a CUDA graph.

A step of a small model is some hundred kernels of a few microseconds each, far less than the time
to launch them one by one. `model.generate` works without graphs.
"""

import warnings
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ratplus_exp.methods import Engine
from ratplus_exp.models.cache import SparseCache
from ratplus_exp.models.prefill import PromptBatch

Action = Callable[[], None]
Capture = Callable[[Action], Action | None]


class CudaGraphs:
    """A `capture` for `greedy` on the current GPU: each step is one launch.

    The last graph lives until the next one has reused its memory pool. Otherwise PyTorch would free
    that memory only by emptying its cache, as `torch.cuda.graph` does before each graph, which
    takes longer than decoding an answer.
    """

    def __init__(self) -> None:
        self.last: torch.cuda.CUDAGraph | None = None
        self.usable = True

    @cached_property
    def stream(self) -> torch.cuda.Stream:
        """Shared by all graphs, since matrix products keep a workspace for each stream."""
        return torch.cuda.Stream()

    def __call__(self, step: Action) -> Action | None:
        """A function that replays the launches of `step`, which is captured without running. None,
        with a warning, if capture fails or failed before: PyTorch may not recover from that."""
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


cuda_graphs = CudaGraphs()  # one a process


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
    """Answers (B, at most max_new_tokens) to prompts, filled with `pad` after the first of `eos`.

    capture: turns a step into a function that repeats it in the same memory, such as `cuda_graphs`.
        If it is or returns None, all steps run in eager mode.
    """
    assert capture is None or engine.recorder is None, "a replayed step calls no recorder"
    cache = prompts.model.new_cache(engine, room=max_new_tokens + prompts.fed)
    step = _Step(prompts.model, cache, prompts.ids[:, -1:], eos, pad)
    logits = prompts.prefill(cache)
    if prompts.fed:
        fed = prompts.ids[:, -prompts.fed :]
        logits = prompts.model(fed, past_key_values=cache, logits_to_keep=1).logits
    step.choose(logits)
    tokens = [step.token.clone()]
    while len(tokens) < max_new_tokens and not bool(step.ended.all()):
        # The first step compiles and loads all kernels and allocates all memory.
        if len(tokens) == 2 and capture is not None:
            step.capture(capture)
        step()
        tokens.append(step.token.clone())
    return torch.cat(tokens, dim=1)


class _Step:
    """A decoding step of a batch: it replaces `token` (B, 1) by the next one."""

    def __init__(
        self, model: Any, cache: SparseCache, token: Tensor, eos: Sequence[int], pad: int
    ) -> None:
        self.model, self.cache, self.pad = model, cache, pad
        self.token, self.eos = token.clone(), token.new_tensor(eos)
        self.ended = torch.zeros(len(token), dtype=torch.bool, device=token.device)
        self.replay: Action | None = None
        self.used: list[Tensor] = []  # the usage of a replay

    def run(self) -> None:
        self.choose(self.model(self.token, past_key_values=self.cache).logits)

    def choose(self, logits: Tensor) -> None:
        """The most likely token by the last of logits (B, ·, V)."""
        new = logits[:, -1].argmax(-1).masked_fill(self.ended, self.pad)
        self.ended |= (new[:, None] == self.eos).any(1)
        self.token.copy_(new[:, None])

    def __call__(self) -> None:
        if self.replay is None:
            return self.run()
        self.replay()
        self.cache.seen += 1
        if self.used:
            self.cache.engine.usage.add(*(x.clone() for x in self.used))

    def capture(self, capture: Capture) -> None:
        """Replay all later steps, if this one can be captured."""
        cache, usage = self.cache, self.cache.engine.usage
        seen, lists = cache.seen, (usage.attended, usage.positions, usage.choosing)
        counted = len(usage.attended)

        def run() -> None:
            self.run()
            if len(usage.attended) > counted:
                self.used = [torch.cat(each[counted:], 1) for each in lists]

        self.replay = capture(run)
        cache.seen = seen  # capturing counted a step that has not run
        for each in lists:
            del each[counted:]

"""Greedy decoding of a batch in steps of one shape, which a GPU replays as a CUDA graph.

A step of a small model is some hundred kernels of a few microseconds each, far less than the time
to launch them one by one. `model.generate` works without graphs.
"""

import warnings
from collections.abc import Callable, Sequence
from functools import cached_property

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


cuda_graphs = CudaGraphs()  # one per process


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
    model, fed = prompts.model, prompts.fed
    cache = model.new_cache(engine, room=max_new_tokens + fed)
    token = prompts.ids[:, -1:].clone()  # (B, 1), replaced in place by each step
    ended = torch.zeros(len(token), dtype=torch.bool, device=token.device)
    ends = token.new_tensor(eos)

    def choose(logits: Tensor) -> None:
        """The most likely token by the last of logits (B, ·, V)."""
        new = logits[:, -1].argmax(-1).masked_fill(ended, pad)
        ended.logical_or_((new[:, None] == ends).any(1))
        token.copy_(new[:, None])

    def step() -> None:
        choose(model(token, past_key_values=cache).logits)

    logits = prompts.prefill(cache)
    if fed:
        logits = model(prompts.ids[:, -fed:], past_key_values=cache, logits_to_keep=1).logits
    choose(logits)
    tokens, run = [token.clone()], step
    while len(tokens) < max_new_tokens and not bool(ended.all()):
        # The first step compiles and loads all kernels and allocates all memory.
        if len(tokens) == 2 and capture is not None:
            run = _replayed(step, cache, capture) or step
        run()
        tokens.append(token.clone())
    return torch.cat(tokens, dim=1)


def _replayed(step: Action, cache: SparseCache, capture: Capture) -> Action | None:
    """A replay of `step` that counts its tokens, too; None if it can't be captured."""
    seen, counts = cache.seen, cache.engine.usage.counts
    counted = len(counts)
    used: list[Tensor] = []  # the usage of a replay

    def step_and_usage() -> None:
        step()
        used.extend(torch.cat(x, 1) for x in zip(*counts[counted:], strict=True))

    replay = capture(step_and_usage)
    cache.seen = seen  # capturing counted a step that has not run
    del counts[counted:]
    if replay is None:
        return None

    def run() -> None:
        replay()
        cache.seen += 1
        if used:
            cache.engine.usage.add(*(x.clone() for x in used))

    return run

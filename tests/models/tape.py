"""What a CUDA graph does, on a CPU: every operation is done again, in the memory of the first time.

A tape bakes in what a graph bakes in (every number that Python knew, every address), and refuses to
ask the device for a number or to copy a list to it, as a graph does.
"""

from __future__ import annotations

import importlib.util
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

SIZES_UNKNOWN = ("aten::nonzero", "aten::masked_select", "aten::_unique2")


def tape(step):
    """A `capture` for `greedy`. Its first replay does nothing, as recording has taken that step."""
    recorded = _Tape()
    with recorded:
        step()
    played = 0

    def replay():
        nonlocal played
        played += 1
        if played > 1:
            recorded.play()

    return replay


class _Tape(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.entries = []

    def __enter__(self):
        def refuse(*_):
            raise RuntimeError("the device was asked while recording")

        self.patches = [mock.patch.object(torch.Tensor, x, refuse) for x in ("tolist", "numpy")]
        if importlib.util.find_spec("triton") is not None:
            self.patches.append(self._recorded_launches())
        for patch in self.patches:
            patch.start()
        return super().__enter__()

    def __exit__(self, *problem):
        for patch in self.patches:
            patch.stop()
        return super().__exit__(*problem)

    def _recorded_launches(self):
        """A launch is one entry, whatever Triton's interpreter does inside."""
        from triton.runtime.interpreter import GridExecutor

        run = GridExecutor.__call__

        def launch(executor, *args, **kwargs):
            def again():
                with _disable_current_modes():
                    run(executor, *args, **kwargs)

            again()
            self.entries.append((again, (), {}, ()))

        return mock.patch.object(GridExecutor, "__call__", launch)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        tensors, read = _tensors(out), {_memory(x) for x in _tensors((args, kwargs))}
        asked = read and any(isinstance(x, bool | int | float) for x in tree_leaves(out))
        if asked or func._schema.name in SIZES_UNKNOWN:
            raise RuntimeError(f"{func} asks the device while recording")
        if func._schema.name == "aten::lift_fresh" and out.dim():
            raise RuntimeError("a list of Python's is copied to the device while recording")
        is_view = any(_memory(x) in read for x in tensors) and not func._schema.is_mutable
        if not is_view:
            self.entries.append((func, args, kwargs, tensors))
        return out

    def play(self):
        for func, args, kwargs, tensors in self.entries:
            for before, after in zip(tensors, _tensors(func(*args, **kwargs)), strict=True):
                if before.data_ptr() != after.data_ptr():
                    before.copy_(after)


def _tensors(tree):
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


def _memory(tensor):
    return tensor.untyped_storage().data_ptr()

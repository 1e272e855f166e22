"""Count what a GPU would have to launch: interpreted Triton kernels, and operations of torch."""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager

from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.runtime import interpreter

from tests.support.cuda_host import host

# Of torch's operations these launch nothing; nor do views.
ALLOCATE = ("empty", "empty_like", "empty_strided", "new_empty", "detach", "record_stream")


class _Torch(TorchDispatchMode):
    def __init__(self, launched: Counter):
        super().__init__()
        self._launched = launched

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if not (function.is_view or name in ALLOCATE):
            self._launched[name] += 1
        return function(*args, **(kwargs or {}))


@contextmanager
def count_launches(monkeypatch):
    """Yields a Counter of launches by name: of the kernel, or of the operation (at least one)."""
    launched: Counter = Counter()
    run = interpreter.GridExecutor.__call__

    def launch(executor, *args, **kwargs):
        launched[executor.fn.__name__] += 1
        with _disable_current_modes():  # the interpreter's own tensors are nobody's
            return run(executor, *args, **kwargs)

    def operate(name, operation, args):
        launched[name] += 1
        with _disable_current_modes():
            return operation(*args)

    with monkeypatch.context() as patch, _Torch(launched):
        patch.setattr(interpreter.GridExecutor, "__call__", launch)
        host.intercept(operate, patch.setattr)
        yield launched

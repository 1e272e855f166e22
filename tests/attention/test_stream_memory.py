"""No tensor is given back while the other stream still uses it.

PyTorch reuses a freed tensor's memory for its own stream at once. So what the transfer stream's
kernels get must live as long as the pool, or be announced to that stream (record_stream), or have
been allocated on it. And the main stream must not get what was allocated on the transfer stream.
"""

from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from triton.runtime import interpreter

from ess_kernels import plan_fetch
from sglang_ess.mem_cache import pool_cuda
from sglang_ess.tiers.transfer_stream import TransferStream
from tests.support.cuda_host import host
from tests.support.small_backend import Run, builder


def storage(tensor):
    return tensor.untyped_storage().data_ptr()


class Collect(TorchDispatchMode):
    """Keeps each tensor that an operation returns, so that no address comes twice."""

    def __init__(self, made):
        super().__init__()
        self._made = made

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        given = {storage(one) for one in tensors_of((args, kwargs))}
        self._made += [one for one in tensors_of(out) if storage(one) not in given]
        return out


def tensors_of(tree) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class WatchedStream(TransferStream):
    """Notes the tensors that are allocated, used and announced on the transfer stream."""

    def __init__(self, device):
        super().__init__("cpu")
        self.inside = False
        self.made, self.used, self.used_by_main, self.announced = [], [], [], []

    @contextmanager
    def on_transfer_stream(self):
        self.inside = True
        with Collect(self.made):
            yield
        self.inside = False

    def record_stream(self, *tensors):
        self.announced += tensors

    def launched(self, args) -> None:
        (self.used if self.inside else self.used_by_main).extend(tensors_of(args))


@pytest.fixture
def build(monkeypatch):
    monkeypatch.setattr(pool_cuda, "TransferStream", WatchedStream)
    return builder(monkeypatch)


def watch(monkeypatch, pool) -> None:
    run = interpreter.GridExecutor.__call__

    def launch(executor, *args, **kwargs):
        pool.transfer.launched((args, kwargs))
        with _disable_current_modes():  # the interpreter's own tensors are nobody's
            return run(executor, *args, **kwargs)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", launch)

    def operate(name, operation, args):
        pool.transfer.launched((args, {}))
        return operation(*args)

    host.intercept(operate, monkeypatch.setattr)


def lasting(pool) -> set[int]:
    """The storages of all tensors that the tiers and staging keep, and of the host tier."""
    found, objects, known = set(), [pool.tier, pool.staging, pool.kv_buffer], set()
    found.add(storage(plan_fetch._NOTHING))
    while objects:
        one = objects.pop()
        if id(one) in known:
            continue
        known.add(id(one))
        if isinstance(one, torch.Tensor):
            found.add(storage(one))
        elif isinstance(one, list | tuple):
            objects += one
        elif type(one).__module__.startswith(("sglang_ess", "ess_kernels")):
            objects += [v for k, v in vars(one).items() if k not in ("groups", "_transfer")]
    return found


def serve(backend) -> None:
    run = Run(backend)
    run.prefill({1: 20, 2: 12})
    run.prefill({2: 3})
    for _ in range(2):
        run.decode([1, 2])


def check(pool) -> None:
    stream, kept = pool.transfer, lasting(pool)
    announced, made = ({storage(one) for one in some} for some in (stream.announced, stream.made))
    lost = [one.shape for one in stream.used if storage(one) not in kept | announced | made]
    assert not lost, f"freed while the transfer stream uses it: {lost}"
    crossed = [one.shape for one in stream.used_by_main if storage(one) in made - kept]
    assert not crossed, f"freed while the main stream uses it: {crossed}"
    assert stream.used and stream.used_by_main and stream.made


CASES = pytest.mark.parametrize(
    ("overlap", "rows"), [("dba", 28), ("da", 16), ("off", 12)],
    ids=["halves", "no room to reserve", "two passes"],
)  # fmt: skip


@CASES
def test_each_stream_keeps_what_it_uses(build, monkeypatch, overlap, rows):
    backend = build(overlap, hot_rows=rows, sizes=(1, 2))
    pool = backend.token_to_kv_pool
    watch(monkeypatch, pool)
    serve(backend)
    check(pool)


@pytest.mark.parametrize("forgotten", ["slots", "top-k"])
def test_what_is_not_announced_is_noticed(build, monkeypatch, forgotten):
    backend = build("da", hot_rows=28, sizes=(1, 2))
    pool, announce = backend.token_to_kv_pool, WatchedStream.record_stream
    is_it = {
        "slots": lambda one: one.dim() == 1 and one.dtype == torch.int64,
        "top-k": lambda one: one.dim() == 2,
    }[forgotten]
    monkeypatch.setattr(
        WatchedStream, "record_stream",
        lambda stream, *tensors: announce(stream, *(one for one in tensors if not is_it(one))),
    )  # fmt: skip
    watch(monkeypatch, pool)
    serve(backend)
    with pytest.raises(AssertionError, match="freed while the transfer stream uses it"):
        check(pool)

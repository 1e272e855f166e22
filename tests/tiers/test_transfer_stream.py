"""TransferStream in a capture, over streams and events that only note what they are asked."""

import weakref
from types import SimpleNamespace

import pytest
import torch

from sglang_ess.tiers import transfer_stream
from sglang_ess.tiers.transfer_stream import TransferStream, wait


class Stream:
    def __init__(self, *args, **options):
        self.waited = []

    def wait_stream(self, stream):
        self.waited.append(stream)

    wait_event = wait_stream


class Tensor:
    """Stands for a CUDA tensor. announced: to these streams"""

    def __init__(self):
        self.announced = []

    def record_stream(self, stream):
        self.announced.append(stream)


@pytest.fixture
def cuda(monkeypatch):
    """The state of a device: its main stream, and whether that is captured."""
    state = SimpleNamespace(main=Stream(), capturing=True)
    for name, value in {
        "Stream": Stream,
        "current_stream": lambda: state.main,
        "is_current_stream_capturing": lambda: state.capturing,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(transfer_stream.Point, "record", lambda point, stream: None)
    return state


def kept(stream, count=1):
    """`count` tensors that only the stream can keep alive, as weak references."""
    tensors = [Tensor() for _ in range(count)]
    stream.record_stream(*tensors)
    return [weakref.ref(tensor) for tensor in tensors]


def test_outside_of_a_capture_pytorch_is_told(cuda):
    cuda.capturing = False
    stream, tensor = TransferStream("cuda"), Tensor()
    stream.record_stream(tensor)
    assert tensor.announced == [stream._stream]
    (gone,) = kept(stream)
    assert gone() is None


def test_a_captures_tensors_live_until_the_main_stream_has_waited_for_a_later_point(cuda):
    stream = TransferStream("cuda")
    first = kept(stream, 2)
    before = stream.event()
    late = kept(stream)
    after = stream.event()
    assert all(one() is not None and not one().announced for one in first + late)
    wait(before)
    assert cuda.main.waited == [before]
    assert all(one() is None for one in first) and late[0]() is not None
    more = kept(stream)
    wait(after)
    wait(before)  # again, and late: nothing to let go
    assert late[0]() is None and more[0]() is not None
    stream.join()
    assert more[0]() is None and cuda.main.waited[-1] is stream._stream


def test_a_tensor_kept_twice_lives_until_its_last_use(cuda):
    stream = TransferStream("cuda")
    tensor = Tensor()
    stream.record_stream(tensor)
    first = stream.event()
    stream.record_stream(tensor)
    gone = weakref.ref(tensor)
    del tensor
    wait(first)
    assert gone() is not None
    wait(stream.event())
    assert gone() is None


def test_without_a_device_nothing_is_kept():
    stream = TransferStream("cpu")
    (gone,) = kept(stream)
    assert stream.event() is None and gone() is None
    wait(None)
    stream.join()

"""The throttled link: copies take bytes / rate, however the machine sleeps. No test waits."""

import time

import pytest

from sglang_ess.tiers.throttled_link import ThrottledLink, measure

MIB = 1 << 20


class Clock:
    """time.perf_counter and time.sleep; a sleep takes `overshoot` times what it was asked."""

    def __init__(self):
        self.now, self.overshoot, self.naps = 0.0, 1.0, []

    def sleep(self, seconds):
        self.naps.append(seconds)
        self.now += self.overshoot * seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(time, "sleep", clock.sleep)
    return clock


def test_many_small_copies_take_as_long_as_one_large(clock):
    """1 MiB at 100 MiB/s: 10 ms, in copies of 10 us each, none of which sleeps alone."""
    link = ThrottledLink(100 * MIB)
    for _ in range(1024):
        link.carried(1024, 0.0)
    assert clock.now == pytest.approx(0.010, rel=0.05)
    assert 10 < len(clock.naps) < 100


def test_a_slow_copy_owes_nothing(clock):
    link = ThrottledLink(100 * MIB)
    for _ in range(1024):
        link.carried(1024, seconds=1.0)
    assert clock.naps == []


def test_what_overslept_is_paid_ahead(clock):
    """A sleep of 50 ms for 10 owed: the next four copies of 10 ms are free."""
    clock.overshoot, link = 5.0, ThrottledLink(100 * MIB)
    for _ in range(5):
        link.carried(MIB, 0.0)
    assert clock.naps == [pytest.approx(0.010)]
    link.carried(MIB, 0.0)
    assert len(clock.naps) == 2


def test_the_measured_rate_is_the_counted_one_where_sleeps_last_too_long(clock):
    clock.overshoot, link = 1.9, ThrottledLink(100 * MIB)

    def copy():
        link.carried(MIB, 0.0)
        return MIB

    assert measure(copy) == pytest.approx(100 * MIB, rel=0.35)


def test_a_rate_must_be_positive():
    with pytest.raises(ValueError, match="more than 0 B/s"):
        ThrottledLink(0)

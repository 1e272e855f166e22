"""The link between host and device: its measured rate, and a slower one to count with.

On the CPU platform both tiers are the same memory, so a miss costs next to nothing. A counted
link makes each copy take as long as its bytes would at a given rate, so that what a miss costs
beside attention is what it is where the tiers are apart.
"""

from __future__ import annotations

import time
from collections.abc import Callable

SLEEP_SECONDS = 200e-6  # shorter sleeps overshoot by as much as they take
PROBE_ROWS = 2048  # of a top-k: 1.3 MB of fp8 rows, well above a copy's fixed cost
PROBE_ROUNDS = 3


def probe_bytes(row_bytes: int) -> int:
    """Of the buffers of one probe on a device: rows, their slots, their places, how many."""
    return PROBE_ROWS * (row_bytes + 4 + 4) + 4


class ThrottledLink:
    """Copies that take bytes / rate seconds. Raises: ValueError for a rate of 0 or less.

    bytes_per_second: of the link; layers share one, as they share a bus
    """

    def __init__(self, bytes_per_second: float):
        if not bytes_per_second > 0:
            raise ValueError(f"link rate must be more than 0 B/s: got {bytes_per_second}.")
        self.bytes_per_second = bytes_per_second
        self._owed = 0.0  # seconds

    def carried(self, num_bytes: int, seconds: float) -> None:
        """A copy of so many bytes took `seconds`: wait out the rest, when it is worth a sleep."""
        # A copy slower than the link owes nothing, and pays nothing for another one.
        self._owed += max(0.0, num_bytes / self.bytes_per_second - seconds)
        if self._owed >= SLEEP_SECONDS:
            since = time.perf_counter()
            time.sleep(self._owed)
            self._owed -= time.perf_counter() - since  # what overslept is paid ahead


def measure(copy: Callable[[], int]) -> float:
    """Bytes per second of copy(), which returns the bytes it moved, over a few rounds.

    Not of the best: after a sleep that lasted too long, a counted link owes the next copy less.
    """
    since = time.perf_counter()
    num_bytes = sum(copy() for _ in range(PROBE_ROUNDS))
    return num_bytes / (time.perf_counter() - since)

"""A model of the link between host and device for the CPU platform, and a rate measurement.

On the CPU platform both tiers are in the same memory, so a miss costs next to nothing. A
ThrottledLink delays each copy to the time that its bytes take at a given rate. A miss then costs
as much relative to attention as on a GPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable

SLEEP_SECONDS = 200e-6  # shorter sleeps take up to twice as long as asked
PROBE_ROWS = 2048  # as one top-k: 1.3 MB of fp8 rows, well above a copy's fixed cost
PROBE_ROUNDS = 3


def probe_bytes(row_bytes: int) -> int:
    """Device bytes of one probe's buffers: rows, slots, places and their count."""
    return PROBE_ROWS * (row_bytes + 4 + 4) + 4


class ThrottledLink:
    """Makes copies take bytes / bytes_per_second seconds. Layers share one link, as they do a bus.

    Raises: ValueError for a rate of 0 or less.
    """

    def __init__(self, bytes_per_second: float):
        if not bytes_per_second > 0:
            raise ValueError(f"link rate must be more than 0 B/s: got {bytes_per_second}.")
        self.bytes_per_second = bytes_per_second
        self._owed = 0.0  # seconds still to wait

    def carried(self, num_bytes: int, seconds: float) -> None:
        """Take note of a copy of num_bytes that took `seconds`, and sleep for the rest.

        Rests shorter than SLEEP_SECONDS add up. A copy slower than the link adds nothing.
        """
        self._owed += max(0.0, num_bytes / self.bytes_per_second - seconds)
        if self._owed >= SLEEP_SECONDS:
            since = time.perf_counter()
            time.sleep(self._owed)
            self._owed -= time.perf_counter() - since  # oversleeping counts for the next


def measure(copy: Callable[[], int]) -> float:
    """Return the mean bytes per second of PROBE_ROUNDS calls of copy(), which returns its bytes.

    The mean and not the best: after oversleeping, a ThrottledLink delays the next copy less.
    """
    since = time.perf_counter()
    num_bytes = sum(copy() for _ in range(PROBE_ROUNDS))
    return num_bytes / (time.perf_counter() - since)

"""A process that starts others, for tests of what ends with whom.

As `python -m tests.support.family`, what HttpProcess starts; as Family, what a Worker makes.
"""

import subprocess
import time

# A shell, the `sleep` it starts, and one that a signal to end does not.
TREE = ("sh", "-c", "sleep 600 & trap '' TERM INT HUP; sleep 601 & wait")


class Family:
    def __init__(self):
        self._child = subprocess.Popen(TREE)

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


if __name__ == "__main__":
    Family().sleep(600)

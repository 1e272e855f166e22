"""The ranks of a node that share one host tier, and how they build it together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from sglang_ess.errors import PeerRefusal, in_one_line


def _alone(value: Any) -> list[Any]:
    return [value]


@dataclass(frozen=True)
class TierGroup:
    """Ranks that keep the same latent rows on one node. TierGroup(): a rank by itself.

    rank, size: of this process among them
    exchange: gives every rank's value, in the order of the ranks, to each; all must call it
    limit_seconds: how long a rank waits in a pass for another that lives

    Rank 0 is the writer: it alone writes host rows, and the others read them.
    """

    rank: int = 0
    size: int = 1
    exchange: Callable[[Any], list[Any]] = _alone
    limit_seconds: float = 300.0  # as SGLang's watchdog

    @property
    def is_writer(self) -> bool:
        return self.rank == 0

    @contextmanager
    def together(self) -> Iterator[None]:
        """Take a step of the building: every rank goes on when all have taken it, or all raise.

        Without it a rank that fails would leave the others in their next collective for ever.
        Raises: the exception of the block here; PeerRefusal if only other ranks have one.
        """
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
        found = self.exchange(None if failure is None else in_one_line(failure))
        if failure is not None:
            raise failure
        for rank, line in enumerate(found):
            if line is not None:
                raise PeerRefusal(
                    f"all {self.size} ranks that share a host tier must start: rank {rank} has "
                    f"failed ({line}). Its own line says what to do."
                )

"""The interface of what watches top-k lists: the sampler, the trace and the PD recorder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class PassQueries:
    """The queries of one forward pass, on the host.

    req_to_token [requests, max context] int32: SGLang's request table, not a copy
    req_rows [T] int64: the row of req_to_token that each query belongs to
    lengths [T] int32: positions each query sees, itself included
    spans: (row, prefix, tokens) of each request in query order; None in decode
    width: queries of each request in decode: 1, or the draft tokens of a verify step of
        speculative decoding. Those of a request follow one another, at successive positions
    """

    req_to_token: torch.Tensor
    req_rows: torch.Tensor
    lengths: torch.Tensor
    spans: tuple[tuple[int, int, int], ...] | None
    width: int


class TopkObserver:
    """Sees every index group's top-k list before its rows are fetched, once for all its layers.

    Override what is of interest.
    """

    @property
    def runner_ups(self) -> int | None:
        """Slots below the top-k that decode_scores wants of each query; None: no call. CPU only."""
        return None

    def begin_pass(self, request_ids: Sequence[str], queries: PassQueries) -> None:
        """A forward pass begins. Not called on CUDA, where a replayed graph runs no Python.

        request_ids: one for each request, in the order of its queries
        """

    def watches(self, group: int) -> bool:
        """Whether decode_topk does something for this group, at any time."""
        return True

    def decode_topk(self, group: int, topk: torch.Tensor) -> None:
        """A decode step selects topk [T, K] int32 slots, -1 pads, in this index group.

        On CUDA this is captured with the step, so it must launch the same work at each capture
        and replay, and may not wait for the device.
        """

    def decode_scores(
        self, group: int, topk: torch.Tensor, runner_ups: torch.Tensor, scores: torch.Tensor
    ) -> None:
        """The indexer's scores of the lists that decode_topk is about to see. CPU only.

        topk [T, K] int32 slots, -1 pads; runner_ups [T, m] int32: the slots of ranks K + 1 to
        K + m, -1 pads, in any order; scores [T, K + m] float32 of both, NaN for pads
        """

    def prefill_topk(self, group: int, topk: torch.Tensor) -> None:
        """A prefill pass selects topk [T, K] int32 slots, -1 pads, in this group. CPU only."""

    def accepted(self, lengths: Sequence[int]) -> None:
        """The verify step under way keeps this many tokens of each request, 1 to width. CPU only.

        Called after the step's last decode_topk and before the next begin_pass.
        """

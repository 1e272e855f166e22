"""The production admission policy in a simulated rank, fed by the server's own feed."""

from __future__ import annotations

from collections.abc import Iterable

from sglang_ess.admission.feed import AdmissionFeed, LastStep
from sglang_ess.admission.policy import Admission, Candidate
from sglang_ess.admission.working_set import WorkingSetWindow

SAMPLES = 8  # requests of a step: as in attention/sampling.py


class AdmissionGate:
    """One decode rank's admission.

    num_slots  that a sampled top-k names; topk_width: its columns
    sample_layers: layers that the sample goes round
    """

    def __init__(
        self,
        admission: Admission,
        num_slots: int,
        topk_width: int,
        sample_layers: int,
    ):
        self.admission = admission
        window = WorkingSetWindow(num_slots, SAMPLES, topk_width)
        self._feed = AdmissionFeed(self.admission, window, sample_layers)

    @property
    def layer(self) -> int:
        """Of the sample, numbered from 0, whose window is under way."""
        return self._feed.layer

    def keep(self, running: int, last: LastStep | None) -> int:
        """Take note of the last step, None if it was none; how many of `running` may go on."""
        if last is None or not len(last.requests):
            return running
        return self.admission.keep(running) if self._feed.decoded(last) else running

    def admit(self, running: int, waiting: Iterable[Candidate], within: int) -> int:
        """How many of the head of the queue may join, of whom no more than `within` could."""
        return self.admission.admit(running, waiting, within).count

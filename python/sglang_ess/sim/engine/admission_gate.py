"""The production admission policy in a simulated rank, fed as the server feeds it."""

from __future__ import annotations

from collections.abc import Iterable

from sglang_ess.admission.feed import AdmissionFeed, LastStep
from sglang_ess.admission.policy import Admission, Candidate
from sglang_ess.admission.working_set import WorkingSetWindow
from sglang_ess.tiers.topk_sample import SAMPLES


class AdmissionGate:
    """Admission of one decode rank.

    num_slots      slots that a sampled top-k may name; topk_width: its columns
    sample_layers  layers that are sampled in turn
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
    def layer_index(self) -> int:
        """Index of the sampled layer whose window is in progress."""
        return self._feed.layer

    def keep(self, running: int, last: LastStep | None) -> int:
        """Record the last step (None: there was none). Returns how many of `running` may go on."""
        if last is None or not len(last.requests):
            return running
        return self.admission.keep(running) if self._feed.decoded(last) else running

    def admit(self, running: int, waiting: Iterable[Candidate], within: int) -> int:
        """Return how many requests of the queue's head may join, at most `within`."""
        return self.admission.admit(running, waiting, within).count

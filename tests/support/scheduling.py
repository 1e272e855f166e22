"""What admission decides, recorded from inside a running engine, and ways to blind it."""

from dataclasses import dataclass

from tests.support.retraction import _writer


@dataclass(frozen=True)
class Decode:
    """One decode step: its requests, and the policy's figures so far."""

    running: int
    preempted: int
    deferred: dict[str, int]
    working_set_rows: float
    accept_length: float = 1.0


def record() -> None:
    """Append a Decode to the file named by RECORD_VAR at each step."""
    from sglang.srt.managers.scheduler import Scheduler

    write, update = _writer(), Scheduler.update_running_batch

    def recording(scheduler, batch):
        batch = update(scheduler, batch)
        policy = scheduler.ess_gate.admission
        running = 0 if batch is None else len(batch.reqs)
        if policy is None:
            write(Decode(running, 0, {}, 0.0))
        else:
            deferred, figures = (
                dict(policy.deferred),
                (policy.working_set_rows, policy.accept_length),
            )
            write(Decode(running, policy.retractions, deferred, *figures))
        return batch

    Scheduler.update_running_batch = recording


def cautious() -> None:
    """Every miss hurts, and none is worth a larger batch: in a busy machine's long steps both may
    be otherwise.
    """
    from sglang_ess.admission.policy import Admission

    Admission._misses_hurt = lambda *args: True
    Admission.best_batch = lambda self, running, *_: running
    Admission.best_to_keep = lambda self, running: 0


def blind() -> None:
    """Every working set fits: what is admitted too much shows as thrashing only."""
    from sglang_ess.admission.policy import Admission

    cautious()
    Admission._hot_tier_holds = lambda *args: True

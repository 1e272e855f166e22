"""Two processes with SGLang's own process groups over gloo, as the schedulers of two ranks have."""

import traceback
from collections.abc import Callable
from typing import Any

from tests.support import forked, interpreter
from tests.support.cuda_host import host

RANKS, SECONDS = 2, 180


def on_two_ranks(body: Callable[..., Any], folder, *args: Any, **options: Any) -> list[Any]:
    """[body(rank, *args) on each rank]. options: SGLang's, that say how the ranks share the work.

    folder: where the ranks find each other; body, args and results are pickled
    Raises: AssertionError with the rank's traceback
    """
    store, pipes, processes = f"file://{folder}/ranks", [], []
    for rank in range(RANKS):
        receive, send = forked.context.Pipe(duplex=False)
        processes.append(
            forked.context.Process(target=_run, args=(send, rank, store, options, body, args))
        )
        processes[-1].start()
        send.close()
        pipes.append(receive)
    try:
        answers = [pipe.recv() for pipe in pipes if pipe.poll(SECONDS)]
        failures = [result for worked, result in answers if not worked]
        assert not failures, "\n".join(failures)
        assert len(answers) == RANKS, f"each rank must answer within {SECONDS} s"
        return [result for _, result in answers]
    finally:
        for process in processes:
            process.kill()
            process.join()


def _run(pipe, rank, store, options, body, args) -> None:
    try:
        host.stand_in()
        interpreter.allow()  # they stand in for a GPU's ranks
        _make_groups(rank, store, options)
        pipe.send((True, body(rank, *args)))
    except BaseException:
        pipe.send((False, traceback.format_exc()))


def _make_groups(rank: int, store: str, options: dict[str, Any]) -> None:
    from sglang.srt.distributed.parallel_state import (
        init_distributed_environment,
        initialize_model_parallel,
    )
    from sglang.srt.runtime_context import SpawnRanks, publish
    from sglang.srt.server_args import ServerArgs

    args = ServerArgs(model_path="none", tp_size=RANKS, **options)
    publish(args, role="scheduler", ranks=SpawnRanks(world_rank=rank))
    init_distributed_environment(RANKS, rank, store, backend="gloo")
    initialize_model_parallel(backend="gloo")

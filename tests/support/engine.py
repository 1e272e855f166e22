"""A real SGLang engine for tests: scheduler, radix cache, pool and model, in seconds.

Each engine runs in processes of its own, forked from a server that imported SGLang once.
Faults and recorders are installed in the engine's process before it starts its scheduler.
"""

import asyncio
import json
import os
import pickle
import signal
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from multiprocessing import forkserver
from pathlib import Path

import numpy as np

from sglang_ess.config import EssConfig
from tests.support import forked
from tests.support.gather import rids
from tools.forks import fork_children
from tools.processes import end_with_parent

_context = forked.context

RECORD_VAR = "ESS_TEST_RECORD"
SWITCHES = "switches.json"  # beside the file that RECORD_VAR names
SLOTS = 16_384  # a start fills the tiers with zeros


@dataclass
class Output:
    """What one request gave back.

    prompt_logprobs[i] is the logprob of prompt token start + 1 + i, where start is the
    logprob_start_len of the request; logprobs[i] that of output token i.
    """

    rid: str
    token_ids: list[int]
    logprobs: np.ndarray
    prompt_logprobs: np.ndarray
    cached_tokens: int
    meta: dict = field(repr=False)


def start_importing() -> None:
    """Let the fork server begin with its imports, 15 s of one core, while this process goes on."""
    forkserver.ensure_running()


class EngineProcess:
    """One engine; use as a context manager.

    model: checkpoint directory; ess: fields of EssConfig; server_args: SGLang's own
    patches: "module:function" run in the engine's process before anything else
    threads: of its operators; None: as many as a server's. One takes a third of the time where
        another process has the second core: threads wait for one another at every operator.
    """

    def __init__(self, model, ess=None, patches=(), threads: int | None = 1, **server_args):
        self._record = Path(tempfile.mkdtemp(prefix="ess-test-")) / "topk.pickle"
        args = {"model_path": str(model), "log_level": "error", "random_seed": 1}
        args |= {"skip_tokenizer_init": True, "max_total_tokens": SLOTS} | server_args
        env = EssConfig(**(ess or {})).to_env() | {RECORD_VAR: str(self._record)}
        self._pipe, child = _context.Pipe()
        self._process = _context.Process(
            target=_serve, args=(child, args, env, tuple(patches), threads)
        )
        self._process.start()
        child.close()
        self._receive(timeout=180)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _receive(self, timeout=300):
        if not self._pipe.poll(timeout):
            raise TimeoutError(f"the engine gave no answer in {timeout} s")
        status, value = self._pipe.recv()
        if status == "error":
            raise RuntimeError(value)
        return value

    def call(self, name, *args, seconds=300, **kwargs):
        """Run a function of this module in the engine's process: f(engine, *args)."""
        self._pipe.send((name, args, kwargs))
        return self._receive(seconds)

    def generate(self, prompts, max_new_tokens=1, start=0, **sampling) -> list[Output]:
        """Submit the prompts (lists of token ids) together, as one batch."""
        params = {"temperature": 0.0, "max_new_tokens": max_new_tokens, "ignore_eos": True}
        return self.call("_generate", prompts, params | sampling, start)

    def together(
        self, name, prompts, max_new_tokens=1, start=-1, ranks=None, **sampling
    ) -> list[Output]:
        """generate(), all prompts in one batch from the first pass on.

        Needs the patch "tests.support.gather:install". name: a new one each time
        start: -1 scores no prompt token, so that prefixes may hit
        ranks: the data-parallel rank of each prompt; their batches begin in the same step
        """
        params = {"temperature": 0.0, "max_new_tokens": max_new_tokens, "ignore_eos": True}
        return self.call("_generate", prompts, params | sampling, start, name, ranks)

    def abort(self, prompts, seconds, max_new_tokens=1) -> list[str]:
        """Submit the prompts and abort all of them after seconds: their finish reasons."""
        params = {"temperature": 0.0, "max_new_tokens": max_new_tokens, "ignore_eos": True}
        return self.call("_abort", prompts, params, seconds)

    def flush(self) -> None:
        """Empty the radix cache."""
        self.call("_flush")

    def selections(self) -> dict[tuple[str, int], dict[int, np.ndarray]]:
        """{(rid, layer): {query position: selected positions}} of all passes so far.

        Needs the patch "tests.support.recorder:install". A position computed twice (after
        a retraction, or by another request that shares it) keeps the last.
        """
        return self.recorded("selection")

    def recorded(self, kind) -> dict[tuple[str, int], dict[int, np.ndarray]]:
        """As selections(), of one of tests.support.recorder's kinds."""
        return {key: rows for one in self.recorded_by_rank(kind) for key, rows in one.items()}

    def recorded_by_rank(self, kind) -> list[dict[tuple[str, int], dict[int, np.ndarray]]]:
        """recorded() of each process that has recorded anything."""
        files = sorted(self._record.parent.glob(f"{self._record.name}.*"))
        return [_read_record(file, kind) for file in files]

    @contextmanager
    def switched(self, **values):
        """Meanwhile, tests.support.switches reads these values in the engine; then it flushes."""
        file = self._record.with_name(SWITCHES)
        whole = file.with_suffix(".new")  # readers see all of it or nothing
        whole.write_text(json.dumps(values))
        whole.replace(file)
        try:
            yield
        finally:
            file.unlink()
            if self._process.is_alive():
                self.flush()

    def close(self) -> None:
        if self._process.is_alive():
            try:
                self._pipe.send(("_shutdown", (), {}))
            except BrokenPipeError:
                pass
            self._process.join(20)
        if self._process.is_alive():
            self._process.kill()
        self._process.join()
        self._pipe.close()


def _read_record(path, kind) -> dict[tuple[str, int], dict[int, np.ndarray]]:
    found: dict = {}
    with path.open("rb") as file:
        while True:
            try:
                recorded, layer, rid, first, values = pickle.load(file)
            except EOFError:
                return found
            if recorded == kind:
                rows = found.setdefault((rid, layer), {})
                for offset, row in enumerate(values):
                    rows[first + offset] = row[row >= 0] if kind == "selection" else row


def in_fork(function, *args, seconds: float = 120):
    """function(*args) in a process that has imported SGLang; its result, by a pipe."""
    pipe, child = _context.Pipe()
    process = _context.Process(target=_report, args=(child, function, args))
    process.start()
    child.close()
    if not pipe.poll(seconds):
        process.kill()
        raise TimeoutError(f"{function.__name__} gave no answer in {seconds} s")
    result = pipe.recv()
    process.join(20)
    process.kill()  # if it waits for a child of its own
    return result


def _report(pipe, function, args) -> None:
    end_with_parent()
    pipe.send(function(*args))


def run_launcher(argv: list[str], log: Path, seconds: float = 300) -> int | None:
    """Exit status of sglang_ess.launch_server that ends by itself; None: it did not.

    It runs in a session of its own, with everything it starts. log: its stdout and stderr
    """
    return forked.run("sglang_ess.launch_server", *argv, log=log, seconds=seconds)


def _use_threads(count: int) -> None:
    """Of numba's operators and torch's, here and in forks: numba sets torch's as it starts."""
    import numba
    import torch

    numba.set_num_threads(count)
    torch.set_num_threads(count)


def _serve(pipe, server_args, env, patches, threads=None) -> None:
    """Body of the engine's process: build the engine, then run calls from the pipe."""
    end_with_parent()
    os.environ.update(env)
    if threads:
        _use_threads(threads)
    import sglang.srt.entrypoints.engine as engine_module

    fork_children()
    signal.signal(signal.SIGQUIT, lambda *_: os._exit(1))
    try:
        for patch in patches:
            module, function = patch.split(":")
            getattr(import_module(module), function)()
        engine = engine_module.Engine(**server_args)
        pipe.send(("ok", None))
        while True:
            name, args, kwargs = pipe.recv()
            if name == "_shutdown":
                break
            pipe.send(("ok", globals()[name](engine, *args, **kwargs)))
        engine.shutdown()
    except BaseException as error:
        pipe.send(("error", f"{type(error).__name__}: {error}"))
        raise
    os._exit(0)


def _generate(engine, prompts, params, start, group=None, ranks=None) -> list[Output]:
    names = rids(group, len(prompts)) if group else None
    options = {"sampling_params": params, "return_logprob": True, "logprob_start_len": start}
    if ranks is None:
        answers = engine.generate(input_ids=prompts, rid=names, **options)
        return [_output(answer) for answer in answers]

    async def on_ranks():
        return await asyncio.gather(
            *(
                engine.async_generate(input_ids=prompt, rid=name, routed_dp_rank=rank, **options)
                for prompt, name, rank in zip(prompts, names, ranks, strict=True)
            )
        )

    return [_output(answer) for answer in engine.loop.run_until_complete(on_ranks())]


def _output(answer) -> Output:
    meta = answer["meta_info"]
    prompt = [value for value, *_ in meta["input_token_logprobs"] if value is not None]
    return Output(
        rid=meta["id"],
        token_ids=list(answer["output_ids"]),
        logprobs=np.array([value for value, *_ in meta["output_token_logprobs"]]),
        prompt_logprobs=np.array(prompt),
        cached_tokens=meta["cached_tokens"],
        meta={k: v for k, v in meta.items() if "logprobs" not in k},
    )


def _abort(engine, prompts, params, seconds) -> list[str]:
    names = [f"abort-{time.monotonic_ns()}-{i}" for i in range(len(prompts))]

    async def run():
        requests = [
            asyncio.ensure_future(
                engine.async_generate(input_ids=prompt, sampling_params=params, rid=name)
            )
            for prompt, name in zip(prompts, names, strict=True)
        ]
        await asyncio.sleep(seconds)
        for name in names:
            engine.tokenizer_manager.abort_request(rid=name)
        return await asyncio.gather(*requests)

    answers = engine.loop.run_until_complete(run())
    return [answer["meta_info"]["finish_reason"]["type"] for answer in answers]


def _flush(engine) -> None:
    engine.flush_cache()


def _server_info(engine) -> dict:
    return engine.get_server_info()

"""The whole launcher, option by option, up to the first process it would start.

One process imports SGLang; each case is a fork of it, so that what SGLang's checks leave behind
(its context, the environment, logging) stays in the case.
"""

import os
import signal
import sys
import tempfile
import traceback

from sglang_ess.config import EssConfig

READY = 77  # exit status of a case that was not refused
SECONDS = 60  # for a case
OTHER_SERVERS = ("--grpc-mode", "--smg-grpc-mode")  # which start their processes in another way


def launch_dry(model, port, cases):
    """[(exit status, what it wrote)] of each list of flags.

    Run it by tests.support.engine.in_fork(), where SGLang is imported already.
    """
    return [_wait(*_start(["--model-path", str(model), "--port", str(port), *c])) for c in cases]


def _start(argv):
    log, folder = tempfile.TemporaryFile(), tempfile.TemporaryDirectory()
    pid = os.fork()
    if pid:
        return pid, log, folder
    try:
        os.chdir(folder.name)  # some options make folders before anything else is checked
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
        signal.alarm(SECONDS)
        status = _main(argv)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _main(argv) -> int:
    from sglang.srt.entrypoints.engine import Engine

    from sglang_ess import launch_server
    from sglang_ess.launch import shutdown, startup

    os.environ.update(EssConfig().to_env())
    startup.before_processes = lambda *args: None  # compiles kernels
    shutdown.supervised = lambda serve, *args: serve()  # its exit status is for operators
    Engine._launch_scheduler_processes = classmethod(lambda cls, *args, **kw: (_Ready(), []))
    Engine._launch_detokenizer_subprocesses = classmethod(lambda cls, **kw: ([], []))
    return launch_server.main(argv)


class _Ready:
    """For SGLang's SchedulerInitResult; the tokenizer and the templates are loaded by now."""

    all_child_pids: list = []

    def wait_for_ready(self):
        sys.stderr.flush()
        os._exit(READY)


def _wait(pid, log, folder):
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with log, folder:
        log.seek(0)
        return status, log.read().decode(errors="replace")


def generated_cases():
    """[flags] for each flag of SGLang: a bool as it is, others with values of several kinds."""
    import argparse

    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    cases = []
    for action in parser._actions:
        flag = next((name for name in action.option_strings if name.startswith("--")), None)
        if flag in (None, "--help", "--config", "--model-path", "--port", *OTHER_SERVERS):
            continue
        if action.nargs == 0:
            cases.append([flag])
        else:
            cases += [[flag, value] for value in _values(action)]
    return cases


def _values(action):
    if action.choices:
        return ["nonsense", *[str(choice) for choice in list(action.choices)[:8]]]
    if action.type is int:
        return ["x", "0", "-1", "-5", "1", "7", "1000000000000"]
    if action.type is float:
        return ["x", "0", "-1", "2", "nan", "0.5"]
    return ["nonsense", "gone/file", "{bad", "{}", "[]", "", "1", "-1", '{"a": 1}']

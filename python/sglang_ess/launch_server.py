"""`python -m sglang_ess.launch_server`: SGLang's server with ESS. It takes every SGLang flag.

SGLang spawns its processes, and each spawned child imports this module again as __mp_main__. So
the module imports nothing heavy, and in a child its only effect is that it ends with its parent.
"""

from __future__ import annotations

import argparse
import difflib
import logging
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NoReturn

from sglang_ess import errors
from sglang_ess.config import REFUSED, EssConfig
from sglang_ess.cpu import set_thread_defaults
from sglang_ess.launch import peers, shutdown, startup

logger = logging.getLogger(__name__)

PROG = errors.program_name("launch_server")
LOG_LEVELS = ("debug", "info", "warning", "error", "critical")
HTTP_LOG_LEVELS = ("trace", *LOG_LEVELS)  # uvicorn's


def main(argv: list[str] | None = None) -> int:
    """Run the server until it ends. Returns the exit status.

    Returns 2, with one line on stderr for each reason, if the options are refused; otherwise see
    shutdown.supervised().
    Effect: sets SGLANG_ESS_CONFIG for this process and its children.
    Raises: SystemExit for a broken contract; whatever SGLang raises while it serves.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if "-h" in argv or "--help" in argv:
        _full_parser().print_help()
        return 0
    try:
        config, rest = split_args(argv)
    except ValueError as error:
        return _refuse([str(error)])
    # `import sglang` chooses the platform by this variable.
    os.environ.update(config.to_env())
    set_thread_defaults()

    from sglang_ess.launch import preflight

    reasons = preflight.environment_reasons(config, os.environ) + preflight.early_reasons(rest)
    if reasons:
        return _refuse(reasons)
    try:
        place = peers.Place.of(rest, _config_options(rest))
        launchers = None if place is None else peers.Peers(place)
    except errors.Refusal as refusal:
        return _refuse([str(refusal)])
    return shutdown.supervised(lambda: _start(config, rest, place), config.grace_seconds, launchers)


def _start(config: EssConfig, rest: list[str], place: peers.Place | None) -> int:
    try:
        return _serve(config, rest, place)
    except Exception as error:  # from an import or from one of SGLang's checks
        if startup.answers():
            raise
        return _explain(error)


def _serve(config: EssConfig, rest: list[str], place: peers.Place | None) -> int:
    since = time.monotonic()
    startup.progress("importing SGLang (10 to 20 s)")
    from sglang.launch_server import run_server
    from sglang.srt.plugins import load_plugins
    from sglang.srt.utils import kill_process_tree

    from sglang_ess import plugin
    from sglang_ess.launch import http_end, preflight, store_option

    load_plugins()
    if not plugin.registered:
        return _refuse([preflight.NOT_LOADED])
    startup.progress("checking the options and the model")
    server_args = _prepare(rest)
    on_cpu = plugin.activate_cpu_platform() is not None
    if reasons := preflight.server_reasons(server_args, config, on_cpu):
        return _refuse(reasons)
    store_option.apply(server_args, config)
    preflight.resolve(server_args)
    if place is not None:
        peers.use_interface(place)
    startup.before_processes(config.enabled, on_cpu, _may_be_sparse(server_args))
    http_end.bound(config.grace_seconds)
    try:
        with startup.announced(server_args, since, shutdown.serving):
            run_server(server_args)
        shutdown.served()
        _release_schedulers()
    finally:
        kill_process_tree(os.getpid(), include_parent=False)
    return 0


def _may_be_sparse(server_args: Any) -> bool:
    """Whether the model has DeepSeek sparse attention; also True if only SGLang can tell."""
    from sglang.srt.configs.model_config import is_deepseek_dsa

    from sglang_ess.launch.model_source import read_model_config

    model = read_model_config(server_args)
    return model is None or is_deepseek_dsa(model)


def _release_schedulers() -> None:
    """Let SGLang's schedulers release their resources, as SGLang does at SIGTERM."""
    from sglang.srt.entrypoints.http_server import get_global_state

    if (state := get_global_state()) is None:  # SGLang runs another server than its HTTP one
        return
    import zmq
    from sglang.srt.managers.io_struct import ShutdownReq, sock_send
    from sglang.srt.utils.cudacore_pyspy_dump_utils import collect_scheduler_processes

    # The event loop of this socket has ended, so send without it.
    sock_send(zmq.Socket.shadow(state.tokenizer_manager.send_to_scheduler), ShutdownReq())
    until = time.monotonic() + shutdown.RELEASE_SECONDS
    while collect_scheduler_processes() and time.monotonic() < until:
        time.sleep(0.05)


def _explain(error: Exception) -> int:
    """Print in one line why the server did not start. Returns the exit status."""
    logger.debug("SGLang did not start", exc_info=error)
    if f"(exit code: {REFUSED})" in str(error):  # a scheduler has printed why
        return REFUSED
    advice = "" if errors.is_check(error) else " Add --log-level debug for the traceback."
    status = _refuse([errors.refusal(error) + advice])
    return 1 if "(exit code: " in str(error) else status


def split_args(argv: list[str]) -> tuple[EssConfig, list[str]]:
    """(ESS's options, SGLang's arguments). The file of --config may contain ESS's flags too.

    Raises: ValueError (one line) for a bad value, a misspelt ESS flag or a bad file.
    """
    argv = [part for arg in argv for part in _config_parts(arg)]
    parser = _OneLineParser(prog=PROG, add_help=False, allow_abbrev=False)
    EssConfig.add_cli_args(parser)
    # The last occurrence of a flag wins, so the command line overrides the file.
    args, rest = parser.parse_known_args(_file_flags(argv) + argv)
    for arg in rest:
        _refuse_misspelt(arg.partition("=")[0])
    return EssConfig.from_cli_args(args), rest


def _prepare(rest: list[str]) -> Any:
    """SGLang's ServerArgs. SGLang reads a copy of the --config file without ESS's keys.

    Raises: ValueError (one line) for what SGLang's parser refuses.
    """
    place = rest.index("--config") + 1 if "--config" in rest else None
    if place is None:
        return _parsed(rest)
    options = _yaml_mapping(Path(rest[place]))
    theirs = {key: options[key] for key in options if _flag(key) not in EssConfig.flags()}
    if theirs == options:
        return _parsed(rest)
    import yaml

    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump(theirs, file, sort_keys=False)
        file.flush()
        return _parsed([*rest[:place], file.name, *rest[place + 1 :]])


def _parsed(rest: list[str]) -> Any:
    """prepare_server_args(), but an error is one line; SGLang's parser prints its whole usage."""
    from sglang.srt.server_args import ServerArgs, prepare_server_args
    from sglang.srt.utils.server_args_config_parser import ConfigArgumentMerger

    parser = _OneLineParser(prog=PROG)
    ServerArgs.add_cli_args(parser)
    merged = ConfigArgumentMerger(parser).merge_config_with_args(rest)
    logging.disable()  # prepare_server_args() repeats the warnings about deprecated flags
    try:
        args = parser.parse_args(merged)
    finally:
        logging.disable(logging.NOTSET)
    _check_level("--log-level", args.log_level, LOG_LEVELS)
    _check_level("--log-level-http", args.log_level_http or args.log_level, HTTP_LOG_LEVELS)
    return prepare_server_args(rest)


def _check_level(flag: str, level: str, names: tuple[str, ...]) -> None:
    if level.lower() not in names:
        given = f"{flag} must be one of {', '.join(names)}: got {level!r}."
        raise errors.Refusal(f"{given} Correct it.")


def _config_parts(arg: str) -> list[str]:
    # SGLang reads the file only for "--config FILE" and drops "--config=FILE" unread.
    return arg.split("=", 1) if arg.startswith("--config=") else [arg]


def _file_flags(argv: list[str]) -> list[str]:
    """ESS's flags in the file that --config names, as command-line arguments."""
    flags: list[str] = []
    for key, value in _config_options(argv).items():
        flag = _flag(key)
        if flag in EssConfig.flags():
            flags += [flag] * value if isinstance(value, bool) else [flag, str(value)]
        else:
            _refuse_misspelt(flag)
    return flags


def _config_options(argv: list[str]) -> dict[Any, Any]:
    """The mapping in the file of --config; empty without one. Raises: ValueError (one line)"""
    if "--config" not in argv:
        return {}
    if argv.count("--config") > 1 or argv[-1] == "--config":
        raise ValueError(f"--config must be given once, with a file: got {' '.join(argv)}.")
    return _yaml_mapping(Path(argv[argv.index("--config") + 1]))


def _flag(key: Any) -> str:
    return "--" + str(key).replace("_", "-")


def _yaml_mapping(path: Path) -> dict[Any, Any]:
    import yaml

    if path.suffix.lower() not in (".yaml", ".yml") or not path.is_file():
        raise ValueError(f"--config must name a .yaml file: got '{path}'. Correct the path.")
    try:
        options = yaml.safe_load(path.read_text()) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        line = " ".join(str(error).split())
        raise ValueError(f"--config must hold YAML: got '{path}' ({line}). Correct it.") from None
    if not isinstance(options, dict):
        raise ValueError(f"--config must hold a mapping: got '{path}'. Write flag: value lines.")
    return options


def _refuse_misspelt(flag: str) -> None:
    """Raises: ValueError if this is not a flag of SGLang's but almost one of ours."""
    ours = EssConfig.flags()
    cutoff = 0.0 if flag.startswith("--ess") else 0.9  # no flag of SGLang's is that close: tested
    if near := difflib.get_close_matches(flag, ours, n=1, cutoff=cutoff):
        raise ValueError(
            f"ESS's flags must be among {', '.join(ours)}: got {flag}. Did you mean {near[0]}?"
        )


def _full_parser() -> argparse.ArgumentParser:
    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser(prog=PROG)
    EssConfig.add_cli_args(parser)
    ServerArgs.add_cli_args(parser)
    return parser


class _OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise errors.Refusal(f"{message[0].upper()}{message[1:].rstrip('.')}. See {PROG} --help.")


def _refuse(reasons: list[str]) -> int:
    for reason in reasons:
        print(f"sglang-ess: {reason}", file=sys.stderr)
    return REFUSED


if __name__ == "__mp_main__":
    shutdown.follow_parent()
elif __name__ == "__main__":
    sys.exit(main())

"""sglang.srt.entrypoints.http_server: its FastAPI app, before it starts."""

from dataclasses import replace

from ess_patches.contract import Hook

_SETUP = Hook(
    target="sglang.srt.entrypoints.http_server._setup_and_run_http_server",
    kind="before",
    signature="(server_args, tokenizer_manager, template_manager, port_args, scheduler_infos, "
    "subprocess_watchdog, execute_warmup_func=<function _execute_server_warmup>, "
    "launch_callback=None)",
    body="sglang_ess.intake.streams:before_server",
    reason="Adds a middleware that answers an error raised before a response's first byte: "
    "an app takes none once it has started. Tokenizer workers get it from intake/http_app.py.",
    when="cpu",
    test="tests/intake/test_intake.py",
)
HOOKS = (_SETUP, replace(_SETUP, when="cuda"))

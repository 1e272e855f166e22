"""sglang.srt.managers.tokenizer_manager and communicator: the intake of every kind of server.

HTTP routes (the OpenAI, Anthropic and Ollama ones too), tokenizer workers and an offline
Engine all come through these. A wrong field is wrong on any platform, so the rows are in force
wherever ESS serves, and one-tier on the CPU platform, which is ours.
"""

from dataclasses import replace

from ess_patches.contract import Hook

_MANAGER = "sglang.srt.managers.tokenizer_manager.TokenizerManager"
_TEST = "tests/intake/test_intake.py"

_ROWS = (
    Hook(
        target=f"{_MANAGER}.generate_request",
        kind="before",
        signature="(self, obj, request=None)",
        body="sglang_ess.intake.request_checks:before_generate",
        reason="A body before it is expanded: n, the lists of a batch, reserved request ids.",
        when="cpu",
        test=_TEST,
    ),
    Hook(
        target=f"{_MANAGER}._create_tokenized_object",
        kind="around",
        signature="(self, obj, input_text, input_ids, input_embeds=None, mm_inputs=None, "
        "token_type_ids=None)",
        body="sglang_ess.intake.request_checks:create_tokenized",
        reason="Private, but what each prompt passes last before it is sent, as the scheduler "
        "will read it; _validate_one_request sees neither sampling parameters nor types.",
        when="cpu",
        test=_TEST,
    ),
    Hook(
        target="sglang.srt.managers.communicator.FanOutCommunicator.__call__",
        kind="around",
        signature="(self, obj)",
        body="sglang_ess.intake.control:ask",
        reason="A control request and its answer: refuses what cannot be served, and turns a "
        "failure in the scheduler into a status 400.",
        when="cpu",
        test=_TEST,
    ),
)
HOOKS = _ROWS + tuple(replace(row, when="cuda") for row in _ROWS)

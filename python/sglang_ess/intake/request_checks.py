"""Refuses prompts with ids, ranges, lengths or shapes that the server cannot serve.

SGLang checks much itself. This module checks what SGLang leaves to the forward pass, where a wrong
value ends the scheduler, and with it the server.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np

from sglang_ess.intake import Refused, stop_regex

MAX_SAMPLES = 1024  # continuations of one prompt (n); each is a request
# Top logprobs of a prompt become Python objects of about 150 bytes each: at most 600 MB.
MAX_TOP_LOGPROBS = 1 << 22
INT32_MAX = 2**31 - 1
# SGLang divides logits by temperature and penalty; they must stay finite in float32.
MIN_DIVISOR, MAX_BIAS = 1e-6, 1e30
HEALTH_PATHS = ("/health", "/health_generate")
# Fields of a batch that may be lists with one entry per prompt.
PER_PROMPT = (
    *("rid", "image_data", "video_data", "audio_data", "sampling_params", "return_logprob"),
    *("logprob_start_len", "top_logprobs_num", "return_sampling_mask", "sampling_logprobs_mode"),
    *("return_hidden_states", "lora_path", "lora_id", "custom_logit_processor", "bootstrap_host"),
    *("bootstrap_port", "bootstrap_room", "bootstrap_pair_key", "decode_tp_size", "extra_key"),
    *("multi_item_delimiter_indices", "token_indices_to_pool", "cache_salt", "kv_hints"),
)
# Sampling parameters that SGLang derives itself, but would accept from a request.
DERIVED = {"stop_strs", "stop_regex_strs", "stop_str_max_len", "stop_regex_max_len"}
DERIVED |= {"is_normalized"}
# Exceptions that SGLang's parsing raises for a wrong type or a missing part of a body.
BODY_ERRORS = (TypeError, AttributeError, LookupError, ArithmeticError)


def before_generate(manager: Any, obj: Any, request: Any = None) -> None:
    """Body of the BEFORE hook on TokenizerManager.generate_request.

    obj: a GenerateReqInput or EmbeddingReqInput, before SGLang expands it into requests
    Raises: Refused.
    """
    path = request.url.path if request is not None else ""
    for line in body_problems(obj, path):
        raise Refused(line)


def create_tokenized(original: Any, manager: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:
    """Body of the AROUND hook on TokenizerManager._create_tokenized_object.

    Returns the request that the scheduler will receive. Raises: Refused.
    """
    try:
        req = original(manager, obj, *args, **kwargs)
    except BODY_ERRORS as error:
        raise Refused(_not_understood(error)) from error
    model = manager.model_config
    for line in request_problems(req, model.vocab_size, model.hidden_size):
        raise Refused(line)
    _check_wire(req)
    return req


def body_problems(obj: Any, path: str = "") -> Iterator[str]:
    """Errors of a body that is not yet expanded into requests, one line each."""
    rids = obj.rid if isinstance(obj.rid, list) else [obj.rid]
    if path not in HEALTH_PATHS and any(str(rid).startswith("HEALTH_CHECK") for rid in rids):
        yield "rid must not begin with HEALTH_CHECK: a busy server drops such ids. Rename it."
    params = obj.sampling_params
    for one in params if isinstance(params, list) else [params or {}]:
        samples = one.get("n", 1)
        if samples is not None and not (_whole(samples) and 1 <= samples <= MAX_SAMPLES):
            yield f"n must be 1 to {MAX_SAMPLES}: got {_shown(samples)}. Send several requests."
        if derived := DERIVED & one.keys():
            yield f"{min(derived)} must not be given: SGLang derives it. Use stop or stop_regex."
        for name in ("max_new_tokens", "min_new_tokens"):
            if one.get(name) is not None and not _whole(one[name]):
                yield f"{name} must be a whole number: got {_shown(one[name])}. Correct it."
    if params == []:
        yield "sampling_params must have an entry for each prompt: got []. Leave it out."
    embeds = getattr(obj, "input_embeds", None)
    if embeds is not None and not (embeds and embeds[0]):
        yield "input_embeds must have at least one row of numbers: got none. Give a row per token."
    prompts = _batch_size(obj)
    if prompts is None and isinstance(obj.rid, list):
        yield f"rid must be a string for one prompt: got {_shown(obj.rid)}. Send a string."
    for name in PER_PROMPT if prompts is not None else ():
        value = getattr(obj, name, None)
        if isinstance(value, list) and value and len(value) != prompts:
            yield f"{name} must have an entry for each prompt: got {len(value)} for {prompts}."


def _batch_size(obj: Any) -> int | None:
    """Number of prompts of a batch; None if the body is a single prompt."""
    if isinstance(obj.text, list):
        return len(obj.text)
    if obj.text is None and obj.input_ids and isinstance(obj.input_ids[0], list):
        return len(obj.input_ids)
    return None


def request_problems(req: Any, vocab: int, hidden: int) -> Iterator[str]:
    """Errors of one tokenized request, one line each.

    req: a TokenizedGenerateReqInput or TokenizedEmbeddingReqInput
    vocab, hidden: the model's vocabulary size and hidden size
    """
    yield from _prompt_problems(req, vocab, hidden)
    params = req.sampling_params
    if params.top_k > INT32_MAX:
        yield f"top_k must be at most {INT32_MAX}: got {params.top_k}. Use -1 for all."
    for name in ("temperature", "repetition_penalty"):
        if not getattr(params, name) >= MIN_DIVISOR:
            got = getattr(params, name)
            yield f"{name} must be at least {MIN_DIVISOR}: got {got}. Raise it."
    if wrong := [i for i in params.stop_token_ids or () if not 0 <= i < vocab]:
        yield f"stop_token_ids must be 0 to {vocab - 1}: got {wrong[0]}. Drop it."
    yield from filter(None, map(stop_regex.problem, params.stop_regex_strs or ()))
    for key, bias in (params.logit_bias or {}).items():
        if not (isinstance(bias, (int, float)) and abs(bias) <= MAX_BIAS):
            yield f"logit_bias must be a finite number: got {_shown(bias)} for {key}. Correct it."
            break
    if params.stream_interval is not None and params.stream_interval < 1:
        yield f"stream_interval must be at least 1: got {params.stream_interval}. Correct it."
    for name in ("multi_item_delimiter_indices", "token_indices_to_pool"):
        if getattr(req, name) is not None:
            # Both need the whole uncached prompt in one pass, and a mask between items.
            yield f"{name} must be left out: sparse attention cannot keep items apart."
    if hasattr(req, "return_logprob"):
        yield from _logprob_problems(req, vocab)


def _prompt_problems(req: Any, vocab: int, hidden: int) -> Iterator[str]:
    ids, embeds = req.input_ids, getattr(req, "input_embeds", None)
    has_history = getattr(req, "session_params", None) is not None
    if embeds is not None:
        wrong = [row for row in embeds if len(row) != hidden or not all(map(math.isfinite, row))]
        if wrong:
            yield (
                f"input_embeds must be rows of {hidden} finite numbers: "
                f"got one of {len(wrong[0])}. Correct them."
            )
    elif not ids and not has_history:
        yield "A prompt must have at least one token: got none. Give text or input_ids."
    if ids and req.mm_inputs is None:
        view = np.frombuffer(ids, np.int64)
        low, high = int(view.min()), int(view.max())
        if low < 0 or high >= vocab:
            got = low if low < 0 else high
            yield f"input_ids must be 0 to {vocab - 1}: got {got}. Use the model's tokenizer."


def _logprob_problems(req: Any, vocab: int) -> Iterator[str]:
    count, start, length = req.top_logprobs_num, req.logprob_start_len, len(req.input_ids or ())
    if not _whole(count) or not 0 <= count <= vocab:
        yield f"top_logprobs_num must be 0 to {vocab}: got {_shown(count)}. Lower it."
    elif not _whole(start) or start < -1:
        yield f"logprob_start_len must be -1 or a position: got {_shown(start)}. Correct it."
    elif req.return_logprob and start >= 0 and (length - start) * count > MAX_TOP_LOGPROBS:
        yield (
            f"top_logprobs_num x prompt tokens must be at most {MAX_TOP_LOGPROBS}: got {count} x "
            f"{length - start}. Raise logprob_start_len."
        )


def _check_wire(req: Any) -> None:
    """Check that the scheduler can decode the message; it could not answer one that it cannot.

    Raises: Refused.
    """
    from sglang.srt.managers.io_struct import msgpack_decode, msgpack_encode

    if req.mm_inputs is not None:  # decoding these would map shared memory
        return
    try:
        msgpack_decode(msgpack_encode(msgspec.structs.replace(req, time_stats=None)))
    except (msgspec.MsgspecError, *BODY_ERRORS, ValueError) as error:
        raise Refused(_not_understood(error)) from error


def _not_understood(error: Exception) -> str:
    line = (str(error).splitlines() or [""])[0][:300]
    return f"A field of the request must be of another type: got {type(error).__name__}: {line}."


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    return repr(value)[:60]

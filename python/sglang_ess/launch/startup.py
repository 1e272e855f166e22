"""What the operator sees of a start: progress lines on stderr, and a summary when it serves.

The scheduler process has the KV pool; the launcher's process sees when HTTP answers. SGLang's own
handshake carries the facts from one to the other, so that /server_info also shows them ("ess").
"""

from __future__ import annotations

import bisect
import functools
import http.client
import ssl
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any
from urllib.parse import urlsplit

from sglang_ess.layout import MIB
from sglang_ess.testing.topk_stream import announce

PREFIX = "[sglang-ess]"  # "sglang-ess: " is for refusals, which end the process
HTTP_SERVER = "sglang.srt.entrypoints.http_server"
POLL_SECONDS = 0.1
READY = " (ready)"  # end of the title of a tokenizer worker that is ready
READY_SECONDS = 5.0  # time limit of a request that asks whether the server is ready


def progress(text: str) -> None:
    """Print one line on stderr, without buffering."""
    print(f"{_prefix()} {text}", file=sys.stderr, flush=True)


def _prefix() -> str:
    return f"{announce.MARK} {PREFIX}" if announce.requested() else PREFIX


def before_processes(enabled: bool, on_cpu: bool, sparse: bool) -> None:
    """Print warnings and prepare kernels, just before SGLang starts its processes.

    sparse: whether the model may have sparse attention; other models use none of our kernels
    """
    if announce.requested():
        progress(
            "warning: --ess-topk-stream replaces what decode attends to: outputs are wrong, only "
            "times and misses mean anything"
        )
    if enabled and not on_cpu:
        progress(
            "warning: ESS on a GPU is written and tested without one; docs/gpu.md says what has "
            "run on which card. --disable-ess serves one-tier."
        )
    if on_cpu and sparse:
        _prepare_kernels()
    progress(
        "starting the scheduler and the detokenizer: each imports SGLang (10 to 20 s), then "
        "the model is loaded and the KV pool allocated"
    )


def _prepare_kernels() -> None:
    """Put the CPU platform's kernels into numba's cache before a process needs them.

    The launcher does this, because a kernel with declared types compiles when the scheduler
    imports it, and the scheduler could not say why its start takes so long.
    """
    progress("preparing the CPU kernels (a machine's first start compiles them: 10 to 20 s)")
    since = time.monotonic()
    from sglang_ess.launch.compile_kernels import warm_up

    how = "compiled" if warm_up() else "loaded from the cache"
    progress(f"CPU kernels {how} in {time.monotonic() - since:.1f} s")


def scheduler_ready(info: dict[str, Any], scheduler: Any) -> dict[str, Any]:
    """Body of the AFTER hook on Scheduler.get_init_info: adds our facts under "ess".

    Effect: loads the kernels of a sparse-attention model, so that its first request finds them.
    """
    facts = serving_facts(scheduler)
    if "latent_format" in facts and str(scheduler.device) == "cpu":
        from sglang_ess.launch.compile_kernels import warm_up

        warm_up()
    if stream := announce.requested():
        facts["topk_stream"] = stream
    return {**info, "ess": facts}


def serving_facts(scheduler: Any) -> dict[str, Any]:
    """What this scheduler serves and what a token costs, as JSON values.

    Sizes are measured on the pool's buffers, not taken from the configuration. The keys of
    _row_facts() exist only for a pool of a sparse-attention model.
    """
    import torch
    from sglang.srt.runtime_context import get_parallel

    from sglang_ess.mem_cache.allocator import sparse_pool
    from sglang_ess.mem_cache.host_share import NodeTiers

    model, pool = scheduler.model_config, sparse_pool(scheduler.token_to_kv_pool_allocator)
    facts = {
        "architecture": (model.hf_config.architectures or ["unknown"])[0],
        "layers": model.num_hidden_layers,
        "dtype": _name(model.dtype),
        "device": str(scheduler.device),
        "threads": torch.get_num_threads(),
        "slots": scheduler.max_total_num_tokens,
        "page_slots": scheduler.page_size,
        "max_running_requests": scheduler.max_running_requests,
        "context_tokens": model.context_len,
        **_request_limits(scheduler),
    }
    if hasattr(pool, "index_k_with_scale_buffer"):
        facts |= {"index_topk": model.hf_config.index_topk} | _row_facts(pool)
        tiers = NodeTiers.of(get_parallel())
        facts |= {"node_host_tiers": tiers.total, "host_tier_ranks": tiers.ranks}
        if not scheduler.spec_algorithm.is_none():
            facts |= _speculation_facts(scheduler)
            facts["device_bytes"] += facts["draft_bytes"]
    return facts


def _request_limits(scheduler: Any) -> dict[str, int]:
    """Most tokens of a single request: limited by the context or by the slots.

    SGLang's own functions decide, because each reserves some tokens.
    """
    page, max_tokens = scheduler.page_size, scheduler.max_req_len - 1

    def output(prompt: int) -> int:
        room = scheduler.token_to_kv_pool_allocator.max_new_tokens_for_memory(
            prompt,
            max_tokens - prompt,
            token_capacity=scheduler.max_total_num_tokens,
            sliding_window_size=scheduler.sliding_window_size,
            chunk_size=scheduler.chunked_prefill_size,
        )
        return room or 0

    prompts = range(1, scheduler.max_req_input_len)  # its end is the first that SGLang refuses
    longest = bisect.bisect_left(prompts, True, key=lambda prompt: output(prompt) < 1)
    # A prompt of whole pages leaves no slot of its last page unused.
    longest_request = min(max_tokens, page + output(page))
    return {"max_prompt_tokens": longest, "max_request_tokens": longest_request}


def _row_facts(pool: Any) -> dict[str, Any]:
    latents, pages = pool.kv_buffer, pool.index_k_with_scale_buffer
    keys = [page for page in pages if len(page)]  # a layer that reuses another's top-k has none
    row_bytes, key_bytes = latents[0][0].nbytes, keys[0][0].nbytes // pool.page_size
    exact_keys = key_bytes == 4 * pool.index_head_dim
    return {
        "latent_format": "fp8_e4m3" if latents[0].itemsize == 1 else _name(latents[0].dtype),
        "latent_row_bytes": row_bytes,
        "latent_layers": len(latents),
        "index_key_format": "float32" if exact_keys else "fp8_e4m3",
        "index_key_bytes": key_bytes,
        "index_key_layers": len(keys),
        "kv_bytes_per_token": len(latents) * row_bytes + len(keys) * key_bytes,
        "kv_total_bytes": sum(buffer.nbytes for buffer in (*latents, *pages)),
    } | _tier_facts(pool)


def _speculation_facts(scheduler: Any) -> dict[str, Any]:
    """Queries of a request in a verify step, and bytes of the draft model's pool, which has one
    tier on the device. An algorithm without a draft model (n-grams) has none.
    """
    from sglang.srt.runtime_context import get_spec

    pool = scheduler.draft_worker.primary_draft_kv_pool
    return {
        "verify_queries": get_spec().speculative_num_draft_tokens,
        "draft_layers": 0 if pool is None else pool.layer_num,
        "draft_bytes": 0 if pool is None else int(pool.get_kv_size_bytes()),
    }


def _tier_facts(pool: Any) -> dict[str, Any]:
    """Bytes on the device and on the host, without a draft model's. With one tier all are on the
    device.
    """
    if not hasattr(pool, "hot_caches"):
        return {"tiers": 1, "device_bytes": int(pool.get_kv_size_bytes()), "host_bytes": 0}
    rows = [cache.num_rows for cache in pool.hot_caches]
    pages = pool.host_tier.residence
    where = {} if pages is None else {
        "host_huge_bytes": pages.huge_bytes,
        "host_numa_bytes": {str(node): n for node, n in pages.node_bytes.items()},
    }  # fmt: skip
    return where | {
        "tiers": 2,
        "device_bytes": pool.device_bytes,
        "host_bytes": pool.host_tier.nbytes,
        "index_groups": len(pool.groups),
        "hot_rows": max(rows),
        "hot_ratio": sum(rows) / sum(cache.num_slots for cache in pool.hot_caches),
        "staging_rows": pool.staging.num_rows,
    }


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


_MODEL_ROWS = (
    ("model", "{model_path} ({architecture}, {layers} layers, {dtype})"),
    ("device", "{device}, {threads} threads"),
)
_ROW_ROWS = (
    (
        "KV format",
        "latent rows {latent_format}, {latent_row_bytes} B; "
        "index keys {index_key_format}, {index_key_bytes} B",
    ),
    (
        "bytes per token",
        "{kv_bytes_per_token} = {latent_layers} x {latent_row_bytes} latent rows "
        "+ {index_key_layers} x {index_key_bytes} index keys",
    ),
    ("top-k", "{index_topk}"),
)
_TIER_ROWS = {
    1: (("KV memory", "{device_mib:.0f} MiB, all on the device (one-tier)"),),
    2: (
        (
            "device memory",
            "{device_mib:.0f} MiB: index keys, maps of {index_groups} index groups, "
            "{hot_rows} hot rows a layer "
            "({hot_ratio:.0%} of the slots), 2 x {staging_rows} staging rows",
        ),
        ("host tier", "{host_tier}"),
    ),
}
_SPECULATION_ROWS = (("speculation", "{speculation}"),)
_LIMIT_ROWS = (
    ("slots", "{slots} in pages of {page_slots}"),
    (
        "limits",
        "{max_running_requests} requests at once; one has {max_request_tokens} tokens at most, "
        "{max_prompt_tokens} of them its prompt",
    ),
)


def block(server_args: Any, facts: dict[str, Any], seconds: float) -> str:
    """The summary. facts: serving_facts(), or {} if no scheduler of this process sent them."""
    values = {
        **facts,
        "model_path": server_args.model_path,
        "url": server_args.url(),
        "device_mib": facts.get("device_bytes", 0) / MIB,
        "host_tier": _host_text(facts),
        "speculation": _speculation_text(facts),
    }
    rows: tuple[tuple[str, str], ...] = _MODEL_ROWS if facts else (("model", "{model_path}"),)
    if "latent_format" in facts:
        rows += _ROW_ROWS + _TIER_ROWS[facts["tiers"]]
        rows += _SPECULATION_ROWS if "verify_queries" in facts else ()
    rows += (_LIMIT_ROWS if facts else ()) + (("URL", "{url}"),)
    if "topk_stream" in facts:
        rows += (("top-k stream", "{topk_stream}: outputs are wrong (--ess-unsafe)"),)
    lines = [f"{_prefix()} ready after {seconds:.1f} s"]
    return "\n".join(lines + [f"    {name:<15} {text.format_map(values)}" for name, text in rows])


def _host_text(facts: dict[str, Any]) -> str:
    """The host tiers of the node, who shares them, and where the pages lie if they are taken.

    The scheduler that sent the facts knows the pages of its own tier.
    """
    from sglang_ess.mem_cache.host_share import node_text

    num_bytes = facts.get("host_bytes", 0)
    tiers, ranks = facts.get("node_host_tiers", 1), facts.get("host_tier_ranks", 1)
    text = node_text(num_bytes, tiers, ranks)
    if "host_huge_bytes" not in facts:
        return text
    from sglang_ess.tiers.host_memory import Residence

    pages = Residence(num_bytes, facts["host_huge_bytes"], facts["host_numa_bytes"])
    return f"{text}; {pages.text}"


def _speculation_text(facts: dict[str, Any]) -> str:
    """The rows that a verify step may need hot for each request, and the draft model's memory."""
    queries, layers = facts.get("verify_queries", 1), facts.get("draft_layers", 0)
    rows = min(queries * facts.get("index_topk", 0), facts.get("max_request_tokens", 0))
    text = f"a step verifies {queries} tokens of a request: up to {rows} rows of a layer"
    if layers == 0:
        return text
    mib = facts["draft_bytes"] / MIB
    return f"{text}; {layers} draft layer{'s' * (layers > 1)}, {mib:.0f} MiB on the device"


@contextmanager
def announced(
    server_args: Any, since: float, serving: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """Print the summary when the server that is started inside this context is ready.

    since: time.monotonic() of the start; serving: called just before the summary
    Prints nothing if the start fails, or if SGLang runs another server than its HTTP one (gRPC,
    encoder only).
    """
    ended = threading.Event()
    args = (server_args, since, serving, ended)
    thread = threading.Thread(target=_announce, args=args, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _http_state() -> Any | None:
    """SGLang's state of this process's HTTP server; None before there is one.

    This does not import the module: SGLang decides in the main thread whether it needs it.
    """
    get_state = getattr(sys.modules.get(HTTP_SERVER), "get_global_state", None)
    return get_state() if get_state else None


def answers() -> bool:
    """Whether this process's HTTP server is ready, that is, SGLang's start is over."""
    state = _http_state()
    return state is not None and getattr(state.tokenizer_manager, "is_ready", lambda: True)()


def _announce(
    server_args: Any, since: float, serving: Callable[[], None], ended: threading.Event
) -> None:
    if server_args.node_rank > 0:  # its HTTP server answers nothing but whether it lives
        while not _answers(server_args, "/health"):
            if ended.wait(POLL_SECONDS):
                return
        serving()
        progress(f"node {server_args.node_rank} is ready; node 0 takes the requests")
        return
    while (state := _http_state()) is None:
        if ended.wait(POLL_SECONDS):
            return
    progress("the scheduler is ready; SGLang sends itself a warm-up request")
    while not _is_ready(server_args, state.tokenizer_manager):
        if ended.wait(POLL_SECONDS):
            return
    serving()
    facts = state.scheduler_info.get("ess", {})
    print(block(server_args, facts, time.monotonic() - since), file=sys.stderr, flush=True)


def _is_ready(server_args: Any, manager: Any) -> bool:
    """Whether a client would get an answer from every HTTP process, after its own warm-up.

    manager: SGLang's tokenizer manager; with several HTTP processes its router, which is not asked
    """
    workers = server_args.tokenizer_worker_num
    if workers == 1:
        return manager.is_ready() and _answers(server_args)
    if not server_args.enable_http2:  # Granian's workers do not tell
        return ready_workers() >= workers and _answers(server_args)
    time.sleep(1)  # SGLang logs each attempt
    return len(manager.all_worker_ipcs) >= workers and _answers(server_args)


def tell_ready() -> None:
    """In a tokenizer worker: add READY to the title of its process once it is ready.

    The workers share a port and take connections by chance, so the launcher cannot ask each one.
    """
    threading.Thread(target=_tell_ready, daemon=True).start()


def _tell_ready() -> None:
    import setproctitle

    while not answers():
        time.sleep(POLL_SECONDS)
    setproctitle.setproctitle(setproctitle.getproctitle() + READY)


def ready_workers() -> int:
    """How many of the processes that this one has started say that they are ready."""
    import psutil

    ready = 0
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it ended meanwhile
            ready += " ".join(process.cmdline()).rstrip().endswith(READY)
    return ready


def _answers(server_args: Any, path: str = "/ready") -> bool:
    """Whether a path answers 200 on a new connection."""
    url = urlsplit(server_args.url())
    kind: Callable[..., http.client.HTTPConnection] = http.client.HTTPConnection
    if url.scheme == "https":  # the server's certificate need not be valid for this host name
        context = ssl._create_unverified_context()
        kind = functools.partial(http.client.HTTPSConnection, context=context)
    key = server_args.api_key
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    connection = kind(url.hostname, url.port, timeout=READY_SECONDS)
    try:
        connection.request("GET", path, headers=headers)
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()

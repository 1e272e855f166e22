"""A start as the operator sees it: progress in order, one block whose numbers are right."""

import json
import re
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import torch

from sglang_ess import launch_server, plugin
from sglang_ess.config import ENV_VAR
from sglang_ess.cpu.ops.index_scores import index_scores_paged
from sglang_ess.cpu.ops.sparse_mla import sparse_mla
from sglang_ess.cpu.ops.topk_select import topk_select
from sglang_ess.launch import compile_kernels as warmup
from sglang_ess.launch import preflight, startup
from sglang_ess.layout import LATENT_DIM, ROPE_DIM, ROW_DIM, index_page_bytes
from sglang_ess.testing.tiny_model import TinyModelConfig, write_tiny_model
from sglang_ess.tiers.host_memory import Residence
from sglang_ess.tiers.index_groups import IndexGroups
from tests.conftest import SLOTS, TORCH_THREADS
from tests.support.engine import EngineProcess
from tests.support.launching import in_this_process
from tests.support.server import free_port

PAGE, MIB = 64, 1 << 20
ARGS = SimpleNamespace(
    model_path="m", url=lambda: "http://h:1", api_key=None, tokenizer_worker_num=1, node_rank=0
)
PROGRESS = (
    "importing SGLang",
    "checking the options",
    "preparing the CPU kernels",
    "CPU kernels ",
    "starting the scheduler",
    "the scheduler is ready",
    "ready after ",
)


def printed(server) -> tuple[list[str], dict[str, str]]:
    """(our progress lines, {name: value} of the block), once the block is complete."""
    server.wait_for(lambda: re.search(r"^    URL .*\n", server.log.read_text(), re.M), 10, "summed")
    text = server.log.read_text()
    lines = [line for line in text.splitlines() if line.startswith(startup.PREFIX)]
    block = text.split(lines[-1] + "\n")[1]
    rows = re.match(r"(?:    .*\n)+", block)[0].splitlines()
    return lines, {row[4:19].strip(): row[20:] for row in rows}


def test_progress_comes_in_order_and_the_block_once_at_the_end(server):
    lines, block = printed(server)
    assert [line for line, part in zip(lines, PROGRESS, strict=True) if part not in line] == []
    assert len(block) == 10
    seconds = float(re.search(r"ready after ([\d.]+) s", lines[-1])[1])
    assert 1 < seconds < 600
    warm_up = server.log.read_text().index('"POST /generate')  # SGLang's own comes before us
    assert warm_up < server.log.read_text().index(lines[-1])


def test_the_block_holds_what_config_json_says(server, tiny_v32):
    config = json.loads((tiny_v32 / "config.json").read_text())
    layers = config["num_hidden_layers"]
    latent = (config["kv_lora_rank"] + config["qk_rope_head_dim"]) * 2  # bfloat16
    key = config["index_head_dim"] + 4  # e4m3 and one fp32 scale
    _, block = printed(server)
    assert block["model"] == f"{tiny_v32} (DeepseekV32ForCausalLM, {layers} layers, bfloat16)"
    assert block["device"] == f"cpu, {TORCH_THREADS} threads"
    assert block["KV format"] == "latent rows bfloat16, 1152 B; index keys fp8_e4m3, 132 B"
    assert block["bytes per token"] == (
        f"{layers * (latent + key)} = {layers} x {latent} latent rows + {layers} x {key} index keys"
    )
    rows = SLOTS + PAGE  # SGLang adds one page
    assert block["host tier"] == f"{layers * latent * rows / MIB:.0f} MiB"
    # Neither ratio nor GiB given, and memory enough: every row is hot, 28 B of queue each.
    staging = config["max_position_embeddings"] + PAGE
    plan = 64 * config["index_topk"] * 12
    device = rows * (layers * (key + latent + 28 + 4) + 4) + 2 * staging * latent + plan
    assert block["device memory"] == (
        f"{device / MIB:.0f} MiB: index keys, maps of {layers} index groups, "
        f"{rows} hot rows a layer (100% of the slots), 2 x {staging} staging rows"
    )
    assert block["top-k"] == str(config["index_topk"])
    assert block["slots"] == f"{SLOTS} in pages of {PAGE}"
    context = config["max_position_embeddings"]
    assert block["limits"].endswith(
        f" at once; one has {context - 2} tokens at most, {context - 7} of them its prompt"
    )
    assert block["URL"] == server.url


def test_the_facts_are_in_server_info_too(server, tiny_v32):
    info = server.get("/server_info")
    facts = info["ess"]
    assert facts["slots"] == info["max_total_num_tokens"] == SLOTS
    args = SimpleNamespace(model_path=str(tiny_v32), url=lambda: server.url)
    shown = startup.block(args, facts, 0).splitlines()[1:]
    assert [row[20:] for row in shown] == list(printed(server)[1].values())


@pytest.mark.slow
def test_shared_index_layers_fp8_rows_and_one_tier(tmp_path):
    """GLM keeps no index keys for layers that reuse a top-k; --disable-ess shows that too."""
    config = TinyModelConfig(arch="glm")
    model = write_tiny_model(tmp_path / "glm", config)
    full = config.indexer_types.count("full")
    assert 0 < full < config.layers
    slots = 1024
    ess = {"enabled": False, "index_dtype": "float32"}
    with EngineProcess(model, ess, kv_cache_dtype="fp8_e4m3", max_total_tokens=slots) as engine:
        facts = engine.call("_server_info")["ess"]
        longest = facts["max_prompt_tokens"]
        (served,) = engine.generate([[7] * longest], max_new_tokens=1)
        with pytest.raises(Exception, match=f"memory budget: input_len={longest + 1}"):
            engine.generate([[7] * (longest + 1)], max_new_tokens=1)
    assert longest < slots and len(served.token_ids) == 1
    total = config.layers * 656 + full * 512
    assert facts["kv_total_bytes"] == total * (slots + PAGE)
    assert json.loads(json.dumps(facts)) == facts  # as /server_info sends them
    text = startup.block(ARGS, facts, 0)
    mib = total * (slots + PAGE) / MIB
    assert f"KV memory       {mib:.0f} MiB, all on the device (one-tier)\n" in text
    assert "host tier" not in text and "hot rows" not in text
    assert "latent rows fp8_e4m3, 656 B; index keys float32, 512 B\n" in text
    assert f" {total} = {config.layers} x 656 latent rows + {full} x 512 index keys\n" in text
    assert "(GlmMoeDsaForCausalLM, " in text


@pytest.mark.parametrize("tiers", [1, 2])
def test_the_bytes_of_a_token_of_glm_52(tiers):
    """78 layers of fp8 rows, index keys in 21 of them."""
    rows = [torch.zeros(PAGE, 1, 656, dtype=torch.uint8)] * 78
    selects = [layer < 3 or layer % 4 == 2 for layer in range(78)]
    pages = [torch.zeros(int(one), PAGE * 132, dtype=torch.uint8) for one in selects]
    pool = SimpleNamespace(
        kv_buffer=rows, index_k_with_scale_buffer=pages, page_size=PAGE, index_head_dim=128,
        get_kv_size_bytes=lambda: 0,
    )  # fmt: skip
    if tiers == 2:
        caches = [SimpleNamespace(num_rows=8, num_slots=PAGE)] * 21
        more = dict(hot_caches=caches, device_bytes=0, groups=IndexGroups.of_layers(selects))
        host, staging = SimpleNamespace(nbytes=0, residence=None), SimpleNamespace(num_rows=PAGE)
        pool = SimpleNamespace(**vars(pool), **more, host_tier=host, staging=staging)
    facts = startup._row_facts(pool)
    assert facts["kv_bytes_per_token"] == 53_940 and facts["tiers"] == tiers
    needed = dict(
        model_path="", architecture="", layers=78, dtype="", device="", threads=1, slots=0
    )
    limits = ("index_topk", "page_slots", "max_running_requests", "max_request_tokens")
    needed |= dict.fromkeys((*limits, "max_prompt_tokens"), 1)
    block = startup.block(ARGS, facts | needed, 0)
    assert " 53940 = 78 x 656 latent rows + 21 x 132 index keys\n" in block
    assert ("maps of 21 index groups" in block) == (tiers == 2)


DRAFT = {"draft_layers": 1, "draft_bytes": 12 << 20}


@pytest.mark.parametrize(
    ("facts", "text"),
    [
        ({"draft_layers": 0, "draft_bytes": 0}, "up to 512 rows of a layer"),  # n-grams
        (DRAFT, "up to 512 rows of a layer; 1 draft layer, 12 MiB on the device"),
        (DRAFT | {"max_request_tokens": 300}, "up to 300 rows of a layer; 1 draft layer, 12 MiB"),
        (DRAFT | {"draft_layers": 2}, "up to 512 rows of a layer; 2 draft layers, 12 MiB"),
    ],
)
def test_what_a_verify_step_needs(facts, text):
    """The rows that its queries may select together, of no more than a request has."""
    known = {"verify_queries": 4, "index_topk": 128, "max_request_tokens": 16_382}
    found = startup._speculation_text(known | facts)
    assert found.startswith(f"a step verifies 4 tokens of a request: {text}")


GIB_FACTS = {"host_bytes": 3 << 30}
PINNED = GIB_FACTS | {"host_huge_bytes": 3 << 29, "host_numa_bytes": {"1": 3 << 30}}
NODE = "; 24576 MiB on this node (8 host tiers)"


@pytest.mark.parametrize(
    ("facts", "text"),
    [
        (GIB_FACTS, "3072 MiB"),
        (GIB_FACTS | {"node_host_tiers": 1, "host_tier_ranks": 1}, "3072 MiB"),
        (GIB_FACTS | {"host_tier_ranks": 8}, "3072 MiB, shared by 8 ranks"),
        (
            GIB_FACTS | {"node_host_tiers": 8, "host_tier_ranks": 2},
            f"3072 MiB, shared by 2 ranks{NODE}",
        ),
        (PINNED, "3072 MiB; 50% in huge pages, all on NUMA node 1"),
        (
            PINNED | {"node_host_tiers": 8},
            f"3072 MiB{NODE}; 50% in huge pages, all on NUMA node 1",
        ),
    ],
)
def test_the_host_tier_of_a_node(facts, text):
    assert startup._host_text(facts) == text


def test_where_the_pages_of_a_tier_lie():
    """As JSON has it; a tier whose pages are taken later tells nothing."""
    residence = Residence(8, 4, {0: 3, 1: 5})
    host = SimpleNamespace(nbytes=8, residence=residence)
    caches = [SimpleNamespace(num_rows=8, num_slots=PAGE)]
    staging = SimpleNamespace(num_rows=PAGE)
    pool = SimpleNamespace(
        hot_caches=caches, device_bytes=0, groups=[1], host_tier=host, staging=staging
    )
    facts = startup._tier_facts(pool)
    assert facts["host_huge_bytes"] == 4 and facts["host_numa_bytes"] == {"0": 3, "1": 5}
    assert json.loads(json.dumps(facts)) == facts
    assert residence.text in startup._host_text(facts)
    host.residence = None
    assert not {"host_huge_bytes", "host_numa_bytes"} & set(startup._tier_facts(pool))


def test_nothing_is_printed_when_ess_was_not_asked_for(monkeypatch, capfd):
    """SGLang has a platform here; test_offline.py tests the line printed without one."""
    import sglang.srt.platforms
    from sglang.srt.platforms.cpu import CpuSRTPlatform
    from sglang.srt.plugins.hook_registry import HookRegistry

    calls = []
    monkeypatch.setattr(HookRegistry, "register", lambda *call: calls.append(call))
    monkeypatch.delenv(ENV_VAR, raising=False)
    monkeypatch.setattr(sglang.srt.platforms, "_current_platform", CpuSRTPlatform())
    plugin.register()
    assert calls == [] and capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("accelerator", "flags", "warned"),
    [("cuda", [], True), ("cuda", ["--disable-ess"], False), (None, [], False)],
)
def test_one_tier_on_an_accelerator_is_said_once(
    monkeypatch, capsys, tmp_path, accelerator, flags, warned
):
    import sglang.launch_server
    import sglang.srt.plugins
    import sglang.srt.utils

    (tmp_path / "config.json").write_text(
        json.dumps({"architectures": ["DeepseekV32ForCausalLM"], "index_topk": 64})
    )
    monkeypatch.setenv(ENV_VAR, "")  # so that what main() sets is undone
    monkeypatch.setattr(sglang.launch_server, "run_server", lambda server_args: None)
    monkeypatch.setattr(sglang.srt.plugins, "load_plugins", lambda: None)
    monkeypatch.setattr(sglang.srt.utils, "kill_process_tree", lambda *a, **k: None)
    monkeypatch.setattr(plugin, "registered", True)
    monkeypatch.setattr(plugin, "accelerator", lambda: accelerator)
    monkeypatch.setattr(preflight, "resolve", lambda server_args: None)  # there is no model
    in_this_process(monkeypatch)
    port = str(free_port())
    assert launch_server.main(["--model-path", str(tmp_path), "--port", port, *flags]) == 0
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith(startup.PREFIX)]
    assert sum("one-tier" in line for line in lines) == warned
    assert "ready after" not in lines[-1]


class HttpServer:
    """A stand-in for sglang.srt.entrypoints.http_server."""

    def __init__(self, manager, info):
        self.state = SimpleNamespace(tokenizer_manager=manager, scheduler_info=info)

    def get_global_state(self):
        return self.state


@pytest.fixture
def web():
    """A server on its own port. It answers with statuses in order, then with the last one."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            web.asked.append((self.path, self.headers["Authorization"]))
            self.send_response(web.statuses.pop(0) if len(web.statuses) > 1 else web.statuses[0])
            self.end_headers()

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as web:
        web.statuses, web.asked = [200], []
        thread = threading.Thread(target=web.serve_forever, args=(0.01,))
        thread.start()
        web.url = lambda: f"http://127.0.0.1:{web.server_port}"
        yield web
        web.shutdown()
        thread.join()


def args(url, workers=1, api_key=None, node=0):
    return SimpleNamespace(
        model_path="m", url=url, tokenizer_worker_num=workers, api_key=api_key, node_rank=node
    )


READY = SimpleNamespace(is_ready=lambda: True)


def test_no_block_without_a_hook_on_the_scheduler_but_the_address(monkeypatch, capsys, web):
    """The test has an accelerator."""
    monkeypatch.setitem(sys.modules, startup.HTTP_SERVER, HttpServer(READY, {}))
    serving = threading.Event()
    with startup.announced(args(web.url), time.monotonic(), serving.set):
        err = wait_for_url(capsys)
    assert re.fullmatch(
        r"\[sglang-ess\] the scheduler is ready.*\n\[sglang-ess\] ready after \d\.\d s\n"
        rf"    model           m\n    URL             {web.url()}\n",
        err,
    )
    assert serving.is_set()


def test_it_is_ready_only_once_the_url_answers(monkeypatch, capsys, web):
    """SGLang's manager is ready a moment before its HTTP server."""
    monkeypatch.setitem(sys.modules, startup.HTTP_SERVER, HttpServer(READY, {}))
    web.statuses = [503, 503, 200]
    with startup.announced(args(web.url, api_key="secret"), time.monotonic()):
        assert "ready after" in wait_for_url(capsys)
    assert web.asked == [("/ready", "Bearer secret")] * 3
    assert not startup._answers(args(lambda: f"http://127.0.0.1:{free_port()}"))


def test_a_node_without_requests_is_ready_once_it_answers(capsys, web):
    """SGLang gives a node but the first an HTTP server that knows /health alone."""
    serving, err, until = threading.Event(), "", time.monotonic() + 10
    with startup.announced(args(web.url, node=1), time.monotonic(), serving.set):
        while "ready" not in err and time.monotonic() < until:
            err += capsys.readouterr().err
            time.sleep(0.01)
    assert err == "[sglang-ess] node 1 is ready; node 0 takes the requests\n"
    assert serving.is_set() and web.asked == [("/health", None)]


def wait_for_url(capsys):
    text, until = "", time.monotonic() + 10
    while "URL" not in text and time.monotonic() < until:
        text += capsys.readouterr().err
        time.sleep(0.01)
    return text


@pytest.mark.parametrize("module", [None, HttpServer(SimpleNamespace(is_ready=lambda: False), {})])
def test_a_start_that_fails_ends_without_a_block(monkeypatch, capsys, module):
    monkeypatch.setitem(sys.modules, startup.HTTP_SERVER, module)
    with pytest.raises(RuntimeError), startup.announced(ARGS, time.monotonic()):
        raise RuntimeError
    assert "ready after" not in capsys.readouterr().err


def test_one_warm_up_serves_every_format():
    """No call of the engine brings numba a type that warm_up() did not."""
    warmup.warm_up()
    known = [set(kernel.signatures) for kernel in warmup.KERNELS]
    slots, lengths = torch.zeros(3, 8, dtype=torch.int32), torch.tensor([1, 9, 64]).int()
    query, rope = torch.randn(3, 2, LATENT_DIM), torch.randn(3, 2, ROPE_DIM)
    for dtype in (torch.bfloat16, torch.float32):
        rows = torch.zeros(9, ROW_DIM, dtype=dtype)
        sparse_mla(query.to(dtype), rope.to(dtype), rows, slots, 1.0)
    pages = torch.zeros(2, index_page_bytes(fp32=True), dtype=torch.uint8)
    table = torch.zeros(3, 1, dtype=torch.int32)
    scores = index_scores_paged(torch.randn(3, 4, 128), torch.ones(3, 4), pages, table, lengths)
    rows, tokens = torch.zeros(3, dtype=torch.int64), torch.zeros(4, 64, dtype=torch.int32)
    topk_select(scores, lengths, rows, tokens, 8)
    topk_select(torch.empty(3, 0), lengths, rows, tokens, 64)
    assert [set(kernel.signatures) for kernel in warmup.KERNELS] == known

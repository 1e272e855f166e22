"""The CPU pool of two TP ranks over one host tier: written once, read by both, in every way that
SGLang writes rows.

The ranks are real processes with SGLang's own groups. Each runs the same script.
"""

import math
import os
from types import SimpleNamespace

import pytest
import torch

from sglang_ess.config import EssConfig
from sglang_ess.errors import Refusal
from sglang_ess.mem_cache import capacity
from sglang_ess.mem_cache.capacity import Capacity, Geometry
from sglang_ess.mem_cache.host_share import tier_group
from sglang_ess.tiers.index_groups import IndexGroups
from sglang_ess.trace.trace import Kind, read_trace
from tests.support.ranks import on_two_ranks

PAGE, LAYERS, TOPK, SLOTS = 64, 2, 8, 256
WIDTHS = {torch.float8_e4m3fn: 656, torch.bfloat16: 576}
PROMPT, STEP, MOVED = torch.arange(PAGE, PAGE + 20), torch.tensor([130, 0, 131]), [140, 141]


def new_pool(dtype):
    from sglang.srt.runtime_context import get_parallel

    from sglang_ess.mem_cache.pool_cpu import CpuEssTokenToKVPool

    width, groups = WIDTHS[dtype], IndexGroups((1,) * LAYERS)
    geometry = Geometry(
        LAYERS, width * dtype.itemsize, LAYERS * 132, TOPK, 200, PAGE, groups=groups
    )
    capacity._decided = Capacity(geometry, SLOTS, 100, device_limit_bytes=1 << 40)
    with get_parallel().override(attn_dcp_size=1, attn_dcp_rank=0):
        return CpuEssTokenToKVPool(
            size=SLOTS, page_size=PAGE, kv_lora_rank=512, dtype=dtype, qk_rope_head_dim=64,
            layer_num=LAYERS, device="cpu", index_head_dim=128, enable_memory_saver=False,
            kv_cache_dim=width, start_layer=0, end_layer=LAYERS,
        )  # fmt: skip


def latents(n, seed):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 1, 512, generator=g), torch.randn(n, 1, 64, generator=g)


class Script:
    """What both ranks do with a pool.

    wrong: what went wrong, by name; stores: calls of this rank that store host rows
    """

    def __init__(self, dtype):
        from sglang.srt.mem_cache.memory_pool import MLATokenToKVPool

        from sglang_ess.cpu.dsa_pool import CpuDsaTokenToKVPool

        self.pool, self.stores = new_pool(dtype), 0
        for owner, name in (
            (CpuDsaTokenToKVPool, "_write_mla_kv_buffer"),
            (CpuDsaTokenToKVPool, "_load_rows"),
            (MLATokenToKVPool, "move_kv_cache"),
            (MLATokenToKVPool, "set_kv_buffer"),
        ):
            setattr(owner, name, self._counted(getattr(owner, name)))
        self.wrong = []

    def _counted(self, original):
        def counted(*args, **kwargs):
            self.stores += 1
            return original(*args, **kwargs)

        return counted

    def expect(self, name, condition):
        if not condition:
            self.wrong.append(name)

    def holds(self, name, layer, slots, rows):
        """The host tier has these rows, and so has the hot tier where they are hot."""
        found = self.pool.kv_buffer[layer][slots].flatten(1).view(torch.uint8)
        used = (slots > 0).nonzero().flatten()
        self.expect(name, torch.equal(found[used], rows.view(torch.uint8)[used]))
        cache = self.pool.hot_caches[layer]
        cache.check_rows(torch.arange(cache.num_rows).numpy(), name)

    def write(self, name, slots, seed, write):
        """A pass that writes slots in each layer."""
        self.pool.host_tier.order.begin()
        for index in range(LAYERS):
            k, rope = latents(len(slots), seed + index)
            write(SimpleNamespace(layer_id=index), slots, k, rope)
            self.holds(name, index, slots, self.pool._packed(k, rope))

    def run(self):
        pool = self.pool
        self.write("prompt", PROMPT, 10, pool.write_prompt)
        self.write("step", STEP, 20, pool.write_step)
        self.write("setter", PROMPT[:4], 30, pool.set_mla_kv_buffer)
        if pool.store_dtype == torch.bfloat16:
            k = torch.cat(latents(3, 40), -1).bfloat16()
            pool.host_tier.order.begin()
            pool.set_kv_buffer(SimpleNamespace(layer_id=0), PROMPT[4:7], k, None)
            self.holds("one tensor", 0, PROMPT[4:7], k.flatten(1))
        self._move()
        self._retract()
        return self

    def _move(self):
        """Two slots change places: a second move, by another rank, would put them back."""
        pool, pair = self.pool, torch.tensor(MOVED)
        self.write("to be moved", pair, 50, pool.write_step)
        for index in range(LAYERS):
            pool.store_index_k(index, pair, latents(2, 55)[0][:, 0, :128])
        keys = [buffer.clone() for buffer in pool.index_k_with_scale_buffer]
        pool.move_kv_cache(pair, pair.flip(0))
        for index in range(LAYERS):
            self.holds("move", index, pair.flip(0), pool._packed(*latents(2, 50 + index)))
            changed = not torch.equal(pool.index_k_with_scale_buffer[index], keys[index])
            self.expect("index keys", changed)

    def _retract(self):
        pool, slots = self.pool, torch.arange(PAGE, 2 * PAGE)
        before = [rows[slots].clone() for rows in pool.kv_buffer]
        copy = pool.get_cpu_copy(slots)
        self.write("next owner", slots, 60, pool.write_step)
        pool.load_cpu_copy(copy, slots)
        for index in range(LAYERS):
            self.holds("retraction", index, slots, before[index].flatten(1))


def a_script(rank, fault):
    """(size of the group, what went wrong, stores of this rank) by dtype, then the canary's line.

    fault: "both write": a rank that reads writes, too
    """
    os.environ |= EssConfig(canary_rate=1.0).to_env()
    torch.set_num_threads(1)
    if fault == "both write":
        from sglang_ess.tiers.rank_order import RankOrder

        wait = RankOrder.write

        def write(order, function, *args):
            wait(order, function, *args)
            if not order.is_writer:
                function(*args)

        RankOrder.write = write
    found = []
    for dtype in WIDTHS:
        script = Script(dtype).run()
        found.append((script.pool.host_tier.group.size, script.wrong, script.stores))
    script.pool.host_tier.order.begin()
    loc, layer = torch.tensor([70, 71]), SimpleNamespace(layer_id=1)
    k, rope = latents(2, 80)
    k[1, 0, 5] += rank  # as if the ranks had computed different sums
    try:
        script.pool.write_step(layer, loc, k, rope)
    except RuntimeError as error:
        return found, str(error)
    return found, ""


def test_rows_are_written_once_and_are_those_of_every_rank(tmp_path):
    (writer, none), (reader, line) = on_two_ranks(a_script, tmp_path, None)
    assert [(size, wrong) for size, wrong, _ in writer + reader] == [(2, [])] * 4
    assert [stores for *_, stores in reader] == [0, 0]
    assert all(stores > 10 for *_, stores in writer)
    assert none == "" and line == (
        "ranks that share a host tier must compute the same rows: got another one of slot 71 on "
        "rank 1 than on rank 0, which writes (1 of 2 rows). Stop this server, keep its log and "
        "report it; --disable-ess serves without a shared tier."
    )


def test_a_second_writer_is_noticed(tmp_path):
    (_, _), (reader, _) = on_two_ranks(a_script, tmp_path, "both write")
    assert all("move" in wrong and stores > 0 for _, wrong, stores in reader)


def the_groups(rank):
    from sglang.srt.runtime_context import get_parallel

    together = tier_group()
    with get_parallel().override(node_rank=rank):  # as if the ranks were on two nodes
        apart = tier_group()
    exchanged = together.exchange(rank * 10), apart.exchange(rank * 10)
    return (together.rank, together.size), (apart.rank, apart.size), exchanged


@pytest.mark.parametrize(
    ("options", "group"), [({}, 2), ({"enable_dp_attention": True, "dp_size": 2}, 1)]
)
def test_who_shares(tmp_path, options, group):
    """The ranks of an attention-TP group, on one node; each DP rank has a tier of its own."""
    for rank, (together, apart, exchanged) in enumerate(
        on_two_ranks(the_groups, tmp_path, **options)
    ):
        assert together == (rank if group == 2 else 0, group)
        assert apart == (0, 1)
        assert exchanged == ([0, 10] if group == 2 else [rank * 10], [rank * 10])


@pytest.mark.parametrize(
    ("nodes", "found"),
    [
        ([0, 1, 1], "got 1 on node 0, 2 on node 1"),
        ([3, 3, 4, 4, 4], "got 2 on node 3, 3 on node 4"),
    ],
)
def test_a_group_that_nodes_cut_unequally_is_refused(nodes, found):
    """As with --tp-size 12 --nnodes 3 --enable-dp-attention --dp-size 4: ranks 3, 4 and 5."""
    from sglang.srt.runtime_context import get_parallel

    group = SimpleNamespace(all_gather_object=lambda _: nodes, rank_in_group=0)
    options = {"attn_tp_size": len(nodes), "attn_tp_group": group, "node_rank": nodes[0]}
    with get_parallel().override(**options), pytest.raises(Refusal, match=found):
        tier_group()


@pytest.mark.parametrize(("seconds", "limit"), [(40.0, 40.0), (None, math.inf), (-1.0, math.inf)])
def test_ranks_wait_for_each_other_as_long_as_the_watchdog(seconds, limit):
    """None and a negative number turn SGLang's watchdog off."""
    from sglang.srt.runtime_context import get_context, get_parallel

    group = SimpleNamespace(all_gather_object=lambda _: [0, 0], rank_in_group=0)
    options = {"attn_tp_size": 2, "attn_tp_group": group, "node_rank": 0}
    with get_context().override_server_args(watchdog_timeout=seconds, tp_size=2):
        with get_parallel().override(**options):
            assert tier_group().limit_seconds == limit


def a_traced_pool(rank, file):
    """Plans of one decode step. Returns their misses, and whether this rank records them."""
    from sglang.srt.runtime_context import get_parallel

    os.environ |= EssConfig(trace=str(file)).to_env()
    pool = new_pool(torch.bfloat16)
    first = PAGE + 100 * get_parallel().attn_dp_rank
    topk = torch.arange(first, first + TOPK, dtype=torch.int32)
    misses = [len(cache.plan(topk.view(1, -1)).miss_slots) for cache in pool.hot_caches]
    if pool.trace is not None:
        pool.trace.writer.close()
    return misses, pool.trace is not None


@pytest.mark.parametrize(
    ("options", "files"),
    [
        ({}, {"steps.trace": PAGE}),
        (
            {"enable_dp_attention": True, "dp_size": 2},
            {"steps.trace": PAGE, "steps.dp1.trace": PAGE + 100},
        ),
    ],
)
def test_each_host_tier_has_one_trace(tmp_path, options, files):
    """Two ranks that write one file would make it unreadable."""
    folder = tmp_path / "traces"
    folder.mkdir()
    ranks = on_two_ranks(a_traced_pool, tmp_path, folder / "steps.trace", **options)
    assert [misses for misses, _ in ranks] == [[TOPK] * LAYERS] * 2
    assert [records for _, records in ranks] == [True, len(files) == 2]
    assert {file.name for file in folder.iterdir()} == set(files)
    for name, first in files.items():
        trace = read_trace(folder / name)
        plans = [event.slots for event in trace.events() if event.kind == Kind.PLAN]
        assert [plan.tolist() for plan in plans] == [[[*range(first, first + TOPK)]]] * LAYERS

"""Host tiers of a node share its memory, and ranks of a TP group choose the same sizes.

The ranks are real processes with a real gloo group. Each has its own free memory, reads SGLang's
own configurator, and runs the hook on it.
"""

import logging
import os
import re
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from sglang_ess.config import EssConfig
from sglang_ess.errors import Refusal
from sglang_ess.layout import GIB
from sglang_ess.mem_cache import capacity, host_share
from sglang_ess.mem_cache.host_share import CapacityError, NodeRanks, NodeTiers, host_limit_bytes
from tests.support.engine import in_fork

CONTEXT, DEFAULT = 32 << 10, EssConfig()


def alone(config, free):
    """host_limit_bytes of the only rank."""
    return host_limit_bytes(config, free, NodeTiers())


def a_rank(rank, store, free, budget, config, fault):
    """What one rank of the group decides: (slots, hot rows, device limit, lines of the log), or
    its refusal. It runs in a process of its own. store: a new file, or None for a single rank
    """
    from sglang.srt.runtime_context import get_context, get_parallel

    from benchmarks.serving.capacity import MetaConfigurator, Point

    ranks = 2 if store else 1
    group = SimpleNamespace(cpu_group=None)
    if store:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        files = torch.distributed.FileStore(store, ranks)
        torch.distributed.init_process_group("gloo", store=files, rank=rank, world_size=ranks)
        group.cpu_group = torch.distributed.group.WORLD
    os.environ |= config.to_env()
    capacity.free_host_bytes = lambda: free
    capacity._largest_graph = lambda: None
    if fault:
        capacity.agreed = lambda config, *values: values
    lines = []
    capacity.logger.addHandler(Lines(lines))
    capacity.logger.setLevel(logging.INFO)
    options = dict(page_size=64, tp_size=ranks)
    with (
        get_context().override_server_args(**options),
        get_parallel().override(world_group=group),
    ):
        configurator = MetaConfigurator(Point("v32", CONTEXT, budget))
        try:
            configurator.config_from_budget(budget)  # the plugin has hooked it
        except Refusal as error:
            return type(error).__name__, str(error)
    decided = capacity.decided()
    return decided.slots, decided.hot_rows, decided.device_limit_bytes, lines


class Lines(logging.Handler):
    def __init__(self, lines):
        super().__init__()
        self.lines = lines

    def emit(self, record):
        self.lines.append(record.getMessage())


def two_ranks(tmp_path, free, budget, configs=(DEFAULT, DEFAULT), fault=False):
    store = str(tmp_path / "store")
    with ThreadPoolExecutor(2) as pool:
        calls = [
            pool.submit(
                in_fork, a_rank, rank, store, free[rank], budget[rank], configs[rank], fault
            )
            for rank in range(2)
        ]
        return [call.result() for call in calls]


def one_rank(free, budget, config=DEFAULT):
    return in_fork(a_rank, 0, None, free, budget, config, False)


@pytest.mark.parametrize(
    ("free", "budget"),
    [((100, 60), (40, 40)), ((60, 100), (40, 40)), ((900, 900), (30, 40)), ((60, 100), (9, 40))],
)
def test_ranks_that_read_different_memory_choose_alike(tmp_path, free, budget):
    """Both choose what one rank would with the lesser device memory and the lesser free."""
    free, budget = ([n * GIB for n in numbers] for numbers in (free, budget))
    first, second = two_ranks(tmp_path, free, budget)
    assert first == second
    share = host_share.AUTO_HOST_SHARE * min(free) / GIB
    alone = one_rank(1 << 60, min(budget), EssConfig(host_gib=share))
    assert first[:3] == alone[:3]
    (line,) = first[3]
    found = re.fullmatch(r"ESS: host tier: (\d+) MiB, shared by 2 ranks", line)
    assert int(found[1]) <= share * 1024
    assert alone[3] == []


def test_without_the_agreement_they_would_differ(tmp_path):
    first, second = two_ranks(tmp_path, (100 * GIB, 60 * GIB), (40 * GIB, 40 * GIB), fault=True)
    assert first[0] > second[0]


def refusal(first, second):
    """The line with which both ranks end."""
    assert (first[0], second[0]) == ("CapacityError", "CapacityError")
    assert first[1] == second[1]
    return first[1]


def test_a_refusal_is_on_every_rank(tmp_path):
    """Only one of them is short of memory."""
    config = EssConfig(host_gib=64)
    first, second = two_ranks(
        tmp_path, (63 * GIB, 100 * GIB), (40 * GIB, 40 * GIB), (config, config)
    )
    assert "got 64 GiB, limit 63.00 GiB" in refusal(first, second)


def test_a_refusal_by_device_memory_is_on_every_rank(tmp_path):
    first, second = two_ranks(tmp_path, (90 * GIB, 90 * GIB), (40 * GIB, 1000))
    assert "memory must hold one page of 64 slots" in refusal(first, second)


def test_nodes_with_other_options_are_refused(tmp_path):
    configs = EssConfig(hot_ratio=0.3), EssConfig(hot_ratio=0.31)
    first, second = two_ranks(tmp_path, (90 * GIB, 90 * GIB), (40 * GIB, 40 * GIB), configs)
    line = refusal(first, second)
    assert "must be the same on every node" in line and "--ess-hot-ratio" in line


def test_the_options_that_count_are_options():
    assert set(host_share.SIZE_FLAGS) <= set(EssConfig.flags())


ARGS = dict(
    tp_size=1, pp_size=1, dp_size=1, attn_dp_size=1, attn_cp_size=1, nnodes=1,
    enable_dp_attention=False,
)  # fmt: skip


@pytest.mark.parametrize(
    ("given", "tiers"),
    [
        ({}, (1, 1, 1)),
        ({"tp_size": 8}, (1, 1, 8)),
        ({"tp_size": 16, "nnodes": 2}, (1, 1, 8)),
        ({"tp_size": 4, "pp_size": 4, "nnodes": 2}, (2, 2, 4)),
        ({"tp_size": 2, "dp_size": 4}, (1, 4, 2)),
        ({"tp_size": 8, "dp_size": 8, "enable_dp_attention": True}, (8, 8, 1)),
        ({"tp_size": 8, "dp_size": 4, "enable_dp_attention": True}, (4, 4, 2)),
        ({"tp_size": 8, "attn_dp_size": 8}, (8, 8, 1)),
        ({"tp_size": 8, "attn_cp_size": 2, "attn_dp_size": 2}, (4, 4, 2)),
        ({"tp_size": 32, "attn_dp_size": 32, "nnodes": 4}, (8, 8, 1)),
        ({"tp_size": 32, "attn_dp_size": 2, "nnodes": 4}, (1, 1, 8)),
        ({"tp_size": 12, "attn_dp_size": 3, "nnodes": 2}, (2, 2, 4)),
    ],
)
def test_the_host_tiers_of_a_node(given, tiers):
    assert NodeTiers.of(SimpleNamespace(**ARGS | given)) == tiers
    if "dp_size" not in given:
        in_fork(_sglangs_ranks, given)


def _sglangs_ranks(given):
    from sglang.srt.entrypoints.engine import _calculate_rank_ranges
    from sglang.srt.runtime_context import get_context, get_parallel

    with get_context().override_server_args(**given):
        pipeline, tensor, _, _ = _calculate_rank_ranges(0)
        tp_size, width = get_parallel().tp_size, get_parallel().attn_tp_size
        ranks = [pp * tp_size + tp for pp in pipeline for tp in tensor]
        assert NodeTiers.of(get_parallel()).replica == len({rank // width for rank in ranks})
        assert NodeRanks.of(get_parallel()).replica == len(ranks)


@pytest.mark.parametrize(
    ("tiers", "share"), [((1, 1, 1), 1), ((1, 1, 8), 1), ((8, 8, 1), 8), ((2, 8, 4), 8)]
)
def test_host_tiers_divide_the_host_share(tiers, share):
    tiers, free = NodeTiers(*tiers), 1000 * GIB
    assert host_limit_bytes(EssConfig(), free, tiers) == alone(EssConfig(), free) // share
    config = EssConfig(host_gib=1000)
    assert host_limit_bytes(config, free, tiers) == 1000 * GIB // share


def test_a_replica_asks_only_for_its_own_part():
    """The replicas that started before it have taken theirs."""
    config, tiers = EssConfig(host_gib=800), NodeTiers(2, 8)
    assert host_limit_bytes(config, 200 * GIB, tiers) == 100 * GIB
    with pytest.raises(CapacityError, match="got 800 GiB, 100.00 GiB for each of 8 host tiers"):
        host_limit_bytes(config, 200 * GIB - 1, tiers)


def test_a_single_rank_asks_nobody():
    assert in_fork(_agreed_alone) == (5, 7)


def _agreed_alone():
    from sglang.srt.runtime_context import get_context

    assert not torch.distributed.is_initialized()
    with get_context().override_server_args(tp_size=1):
        return host_share.agreed(EssConfig(), 5, 7)

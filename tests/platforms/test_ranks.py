"""Two ranks with SGLang's own process groups: what the hooks on CUDA make them agree on."""

import json
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ess_kernels import hot_state
from sglang_ess.attention.overlap import Mode
from tests.support.ranks import on_two_ranks
from tests.support.small_backend import TOPK

STEPS, LOOKUPS = 200, 1000
RECEIVER = "sglang.srt.managers.scheduler_components.request_receiver.SchedulerRequestReceiver"
# Many misses make DBA cheapest, some make DA, none leaves it off.
COSTS = {
    "batches": [1, 8],
    "misses": [0, TOPK / 8, TOPK],
    "us": {
        "off": [[1, 50, 400]] * 2,
        "da": [[20, 20, 300]] * 2,
        "dba": [[40, 40, 100]] * 2,
    },
    "empty_us": 0,
    "halving_us": 0,
    "source": "made up",
}
TP = {}
DP = {"enable_dp_attention": True, "dp_size": 2}


def apply_hooks(*targets):
    """Put ESS's hooks of these targets into this process, as the plugin does."""
    from sglang.srt.plugins.hook_registry import HookRegistry

    from ess_patches import contract, hooks

    rows = [row for row in hooks.HOOKS if row.target.endswith(targets)]
    assert len(rows) == len(targets)
    contract.register(rows, "cuda")
    HookRegistry.apply_hooks()


# --- the overlap mode ---------------------------------------------------------------------


class Counters:
    """The counters of a rank's tiers. They come late by chance, and misses follow a random walk."""

    def __init__(self, layers, seed):
        self.random = np.random.default_rng(seed)
        self.counters = np.zeros((layers, hot_state.NUM_COUNTERS), np.int64)
        self.level = 0.0

    def step(self):
        self.level = np.clip(self.level + self.random.normal(0, 300), 0, LOOKUPS)
        self.counters[:, hot_state.LOOKUPS] += LOOKUPS
        self.counters[:, hot_state.MISSES] += int(self.level)

    def is_mirrored(self):
        return self.random.random() < 0.6


def serve(rank, costs, told):
    """A scheduler's loop: take requests, launch the step with its mode's graph, see misses.

    told: whether the hook is there
    Returns (the mode of each step's graph, the mode of this rank's own choice, requests received).
    """
    from sglang.srt.managers.scheduler_components.request_receiver import SchedulerRequestReceiver
    from sglang.srt.runtime_context import get_parallel

    from sglang_ess.attention import backend_cuda
    from sglang_ess.platforms.cuda import graph_variants
    from tests.support import small_backend

    parallel = get_parallel() if told else SimpleNamespace(tp_size=1, attn_dp_enabled=False)
    if told:
        apply_hooks("._broadcast_reqs_across_ranks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend_cuda, "MIRROR_STEPS", 2)
        build = small_backend.builder(patch)
        backend = build("auto", parallel=parallel, overlap_costs=costs)
        tier = backend.token_to_kv_pool.tier
        seen = Counters(backend.policy.layers, seed=rank)
        patch.setattr(tier, "counters", lambda: seen.counters.copy())
        patch.setattr(tier, "is_mirrored", seen.is_mirrored)
        variants = graph_variants(None, None)
        receiver = object.__new__(SchedulerRequestReceiver)
        leads, modes, own, received = rank == 0 or get_parallel().attn_dp_enabled, [], [], []
        for step in range(STEPS):
            time.sleep(seen.random.random() / 500)
            requests = [f"control {step}"] if leads else None
            received += receiver._broadcast_reqs_across_ranks(requests, [])
            modes.append(variants.select(None))
            backend.next_step(8)
            seen.step()
            own.append(backend.policy._own.value)
    return modes, own, received


@pytest.fixture
def costs(tmp_path):
    path = tmp_path / "costs.json"
    path.write_text(json.dumps({"overlap_costs": COSTS}))
    return str(path)


@pytest.mark.parametrize("options", [TP, DP], ids=["tensor parallel", "data parallel"])
def test_every_rank_replays_the_same_modes_graph_at_every_step(tmp_path, costs, options):
    ranks = on_two_ranks(serve, tmp_path, costs, True, **options)
    (modes, own, received), (others, others_own, others_received) = ranks
    assert modes == others and set(modes) == {mode.value for mode in Mode}
    assert own != others_own, "the ranks must have had different wishes"
    assert modes[1:] == own[:-1], "rank 0's choice counts from the next step on"
    assert received == others_received == [f"control {step}" for step in range(STEPS)]


def test_without_the_broadcast_they_would_not(tmp_path, costs):
    ranks = on_two_ranks(serve, tmp_path, costs, False)
    assert ranks[0][0] != ranks[1][0]


def test_groups_that_broadcast_apart_cannot_choose(costs):
    from sglang_ess.attention.overlap import policy_for
    from sglang_ess.config import EssConfig

    apart = SimpleNamespace(
        tp_size=4, attn_dp_enabled=True, enable_dp_attention_local_control_broadcast=True
    )
    chosen = EssConfig(enabled=True, overlap="auto", overlap_costs=costs)
    with pytest.raises(RuntimeError, match="must be off, da or dba"):
        policy_for(chosen, 2, apart)
    named = EssConfig(enabled=True, overlap="da", overlap_costs=costs)
    assert policy_for(named, 2, apart).modes == (Mode.DA,)
    assert policy_for(EssConfig(enabled=True, overlap="auto"), 2, apart).modes == (Mode.OFF,)


# --- decode beside another rank's prefill -------------------------------------------------


def synchronize(rank, modes, served):
    """SGLang's own agreement of the ranks before a step: what rank's batch may do.

    modes: the forward mode's name on each rank; served: whether a two-tier backend is there
    """
    from sglang.srt.managers.scheduler_components import dp_attn
    from sglang.srt.model_executor.cuda_graph_config import Backend
    from sglang.srt.model_executor.forward_batch_info import ForwardMode
    from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

    from sglang_ess.attention import backend_cuda

    apply_hooks("._local_prefill_cuda_graph_vote")
    backend_cuda.active = object() if served else None
    runner = SimpleNamespace(
        prefill_cuda_graph_runner=prefill_runner(),
        spec_algorithm=SpeculativeAlgorithm.NONE,
        model_config=SimpleNamespace(hf_config=SimpleNamespace(architectures=["DeepseekV32"])),
    )
    dp_attn.check_cuda_graph_backend = lambda phase, backend: backend == Backend.BREAKABLE
    dp_attn.uses_ssm_state = lambda config: False  # asks a loaded model's configuration
    batch = batch_of(ForwardMode[modes[rank]])
    dp_attn.prepare_mlp_sync_batch_raw(
        batch, runner, get_idle_batch=None, disable_cuda_graph=False, require_mlp_tp_gather=True,
        disable_overlap_schedule=False, offload_tags=set(),
    )  # fmt: skip
    return batch.can_run_dp_prefill_cuda_graph, batch.can_run_decode_cuda_graph


def prefill_runner():
    """SGLang's runner with what its rank-local policy asks, and no graph."""
    from sglang.srt.model_executor.cuda_graph_config import Backend
    from sglang.srt.model_executor.runner import PrefillCudaGraphRunner

    runner = object.__new__(PrefillCudaGraphRunner)
    sizes = [16, 64, 512]
    for name, value in {
        "_is_full_backend": False, "_fa4_prefill": False, "_captured_attn_metadata_max_bs": None,
        "_backend_vote_prefill_cuda_graph": None, "enable_lora": False,
        "prefill_backend_name": Backend.BREAKABLE, "has_mha_companion_layers": False,
        "max_context_size": None, "max_seq_len": None, "capture_num_tokens": sizes,
        "max_num_tokens": sizes[-1], "_capture_chunked_prefix": False,
    }.items():  # fmt: skip
        setattr(runner, name, value)
    return runner


def batch_of(mode, requests=16, tokens=64):
    """A ScheduleBatch of decode (requests) or prefill (one prompt of so many tokens)."""
    lengths = [5000] * requests if mode.is_decode() else [tokens]
    reqs = [SimpleNamespace(beam_group=None, rid=f"{i}") for i in range(len(lengths))]
    return SimpleNamespace(
        forward_mode=mode, batch_size=lambda: len(reqs), reqs=reqs, extend_num_tokens=tokens,
        encoder_swa_reset=None, extend_lens=[tokens], extend_logprob_start_lens=[tokens],
        prefix_lens=[0], return_logprob=False, has_grammar=False, input_embeds=None,
        replace_embeds=None, multimodal_inputs=None, seq_lens_cpu=torch.tensor(lengths),
        spec_info=None,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("modes", "served", "prefill_graph"),
    [
        (("DECODE", "EXTEND"), True, False),
        (("DECODE", "EXTEND"), False, True),  # what SGLang does without us
        (("EXTEND", "EXTEND"), True, True),
    ],
)
def test_a_decode_batch_never_becomes_a_short_prefill(tmp_path, modes, served, prefill_graph):
    ranks = on_two_ranks(synchronize, tmp_path, modes, served, **DP)
    assert ranks == [(prefill_graph, False)] * 2, "no rank replays a decode graph beside a prefill"


def test_decode_on_both_ranks_replays_its_graphs(tmp_path):
    ranks = on_two_ranks(synchronize, tmp_path, ("DECODE", "DECODE"), True, **DP)
    assert ranks == [(False, True)] * 2

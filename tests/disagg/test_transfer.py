"""What transfer engines are told of the pool, and what they send to ranks that share a host tier.

The bytes are moved here by a stand-in for Mooncake's engine; what is moved where, SGLang says.
"""

import ctypes
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sglang.srt.disaggregation.base.conn import StateType
from sglang.srt.disaggregation.mooncake.conn import KVArgsRegisterInfo, MooncakeKVManager
from sglang.srt.disaggregation.utils import KVClassType, TransferBackend, get_kv_class

from sglang_ess.disagg import transfer
from sglang_ess.disagg.mooncake import EssMooncakeKVManager, Share, share_of
from tests.support.forked import context
from tests.support.pd import end_if_imported

LAYERS, DRAFTS, PAGES, ITEM = 3, 1, 6, 32


class Pool:
    def __init__(self, rank=0, size=1):
        self.host_tier = SimpleNamespace(group=SimpleNamespace(rank=rank, size=size))


@pytest.fixture(autouse=True)
def two_tiers(monkeypatch):
    monkeypatch.setattr(transfer, "EssTokenToKVPool", Pool)


def test_latent_rows_are_in_host_memory_and_drafts_are_not():
    kv_args = SimpleNamespace(kv_data_mem_kinds=["VRAM"] * 3, num_draft_entries=1)
    transfer.describe_pool(None, kv_args, Pool(1, 2), None, total_kv_layers=3)
    assert kv_args.kv_data_mem_kinds == ["DRAM", "DRAM", "VRAM"]
    assert kv_args.host_tier_share == (1, 2)


def test_one_tier_stays_as_upstream_says():
    kv_args = SimpleNamespace(kv_data_mem_kinds=["VRAM"], num_draft_entries=0)
    transfer.describe_pool(None, kv_args, object())
    assert vars(kv_args) == dict(kv_data_mem_kinds=["VRAM"], num_draft_entries=0)


def test_only_mooncakes_manager_is_replaced():
    chosen = [
        transfer.manager_class(get_kv_class(backend, kind))
        for backend in (TransferBackend.MOONCAKE, TransferBackend.NIXL, TransferBackend.FAKE)
        for kind in (KVClassType.MANAGER, KVClassType.SENDER, KVClassType.BOOTSTRAP_SERVER)
    ]
    assert chosen[0] is EssMooncakeKVManager
    assert EssMooncakeKVManager not in chosen[1:]


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("layers", [1, 4, 78])
def test_every_layer_is_in_one_share(layers, count):
    """And the draft layers are in all; shares differ by a layer at most."""
    shares = [Share(i, count).entries(layers, 2) for i in range(count)]
    drafts = [layers, layers + 1]
    assert all(share[-2:] == drafts for share in shares)
    assert [i for share in shares for i in share[:-2]] == list(range(layers))
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("module, imported", [("prometheus_client", False), ("sglang", True)])
def test_plugins_import_no_metrics(module, imported):
    """After them SGLang names the directory of all processes' metrics, which that module reads."""
    process = context.Process(target=end_if_imported, args=(module,))
    process.start()
    process.join(300)
    assert process.exitcode == imported


class Buffers:
    """Pages [PAGES, ITEM] uint8 of each layer and draft layer, as a rank registers them."""

    def __init__(self, fill: str):
        shape = (LAYERS + DRAFTS, PAGES, ITEM)
        values = {"random": torch.randint(1, 256, shape), "zeros": torch.zeros(shape)}[fill]
        self.pages = values.to(torch.uint8)

    def kv_args(self, **more):
        """As SGLang fills it for an MLA pool: its pages stand for index keys, too."""
        pointers = [layer.data_ptr() for layer in self.pages]
        lens = [ITEM] * len(pointers)
        return SimpleNamespace(
            kv_data_ptrs=pointers, kv_item_lens=lens, kv_layer_ids=[], num_draft_entries=DRAFTS,
            aux_data_ptrs=[], state_data_ptrs=[pointers], state_item_lens=[lens],
            state_layer_ids=[[]], engine_rank=0, mla_compression_ratios=None, **more,
        )  # fmt: skip


class Engine:
    """Moves memory in this process. sent: bytes so far"""

    def __init__(self):
        self.sent = 0

    def batch_transfer_sync(self, session, sources, targets, lengths):
        for source, target, length in zip(sources, targets, lengths, strict=True):
            ctypes.memmove(target, source, length)
            self.sent += length
        return 0


def manager(kv_args, kind=EssMooncakeKVManager):
    """SGLang's, without sockets and threads."""
    made = kind.__new__(kind)
    vars(made).update(
        kv_args=kv_args, is_mla_backend=True, is_hybrid_mla_backend=False, pp_size=1,
        attn_tp_size=2, dcp_size=1, dcp_rank=0, local_ip="127.0.0.1", rank_port=1,
        enable_staging=False, enable_custom_mem_pool=False, max_transfer_batch_indices=0,
        engine=Engine(), decode_kv_args_table={}, state_strides_validated={"0", "1"},
    )  # fmt: skip
    return made


def registered(monkeypatch, decode, sender, session):
    """Register a decode rank's buffers with a prefill rank, through SGLang's message."""
    monkeypatch.setattr(type(decode), "get_session_id", lambda self: session)
    message = decode.build_receiver_registration_message()
    sender.decode_kv_args_table[session] = KVArgsRegisterInfo.from_zmq(message)
    return sender.decode_kv_args_table[session]


def send(sender, session, **more):
    info = sender.decode_kv_args_table[session]
    pages = np.arange(PAGES, dtype=np.int32)
    return sender._send_kvcache_generic(
        mooncake_session_id=session, src_data_ptrs=sender.kv_args.kv_data_ptrs,
        dst_data_ptrs=info.dst_kv_ptrs, item_lens=sender.kv_args.kv_item_lens,
        prefill_data_indices=pages, dst_data_indices=pages[::-1].copy(), executor=None, **more,
    )  # fmt: skip


@pytest.fixture
def ranks(monkeypatch):
    """(prefill's manager and buffers, decode's buffers), two decode ranks registered.

    Both have the same rows, and for simplicity the same draft rows.
    """

    def make(sender_kind):
        source, target = Buffers("random"), Buffers("zeros")
        sender = manager(source.kv_args(), sender_kind)
        for rank in range(2):
            decode = manager(target.kv_args(host_tier_share=(rank, 2)))
            registered(monkeypatch, decode, sender, str(rank))
        return sender, source.pages, target.pages

    return make


def test_a_prompt_crosses_once(ranks):
    """Each rank is sent its layers and the draft's; together all rows arrive where they belong."""
    sender, source, target = ranks(EssMooncakeKVManager)
    page = PAGES * ITEM
    assert send(sender, "0") == 0
    assert sender.engine.sent == (1 + DRAFTS) * page
    assert not torch.equal(target, source.flip(1))  # one share is not all
    assert send(sender, "1") == 0
    assert sender.engine.sent == (LAYERS + 2 * DRAFTS) * page
    assert torch.equal(target, source.flip(1))


def test_a_plain_prefill_server_sends_all_to_each(ranks):
    sender, source, target = ranks(MooncakeKVManager)
    for session in ("0", "1"):
        assert send(sender, session) == 0
        assert torch.equal(target, source.flip(1))
        target[:LAYERS].zero_()
    assert sender.engine.sent == 2 * source.nbytes


def test_a_plain_decode_rank_is_sent_all(monkeypatch):
    """So is one that shares its host tier with nobody."""
    for kind, share in (
        (MooncakeKVManager, {}),
        (EssMooncakeKVManager, {"host_tier_share": (0, 1)}),
    ):
        source, target = Buffers("random"), Buffers("zeros")
        sender = manager(source.kv_args())
        info = registered(monkeypatch, manager(target.kv_args(**share), kind), sender, "0")
        assert info.dst_kv_item_lens == [ITEM] * (LAYERS + DRAFTS)
        assert send(sender, "0") == 0
        assert torch.equal(target.pages, source.pages.flip(1))


def test_index_keys_go_to_every_rank(ranks):
    sender, source, target = ranks(EssMooncakeKVManager)
    for session in ("0", "1"):
        assert send(sender, session, state_type=StateType.DSA) == 0
        assert torch.equal(target, source.flip(1))
        target.zero_()


@pytest.mark.parametrize("extra", [[], [7], [7, 0, 2], [0, 0, 2]])
def test_other_numbers_behind_the_lengths_are_no_share(extra):
    info = SimpleNamespace(dst_kv_ptrs=[1, 2], dst_kv_item_lens=[ITEM, ITEM, *extra])
    assert share_of(info) == Share(0, 1)

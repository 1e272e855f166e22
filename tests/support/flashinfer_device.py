"""FlashInfer's MLA without a GPU: its Python runs as it is, its compiled module is a stand-in.

BatchMLAPagedAttentionWrapper, its checks of metadata, of graph buffers and of the work load, and
what it stages are FlashInfer's own. The stand-in keeps a plan where the compiled code does, in the
wrapper's integer workspace, and computes by the definition, in float64, from that workspace and
kv_indices alone.
"""

import torch
from flashinfer.mla._batch_mla import _wrapper
from flashinfer.mla._batch_mla._backends import _fa_common, fa2_backend, fa3_backend

from ess_kernels.sparse_mla import sparse_mla_reference

HOPPER_SMS, HOPPER_SHARED_BYTES = 132, (233472, 232448)  # a multiprocessor's and a block's


class Module:
    """What get_batch_mla_module compiles: plan() and run() with their arguments in its order.

    runs: the arguments of each run(), which are what a CUDA graph would keep
    """

    def __init__(self):
        self.runs = []

    def plan(self, floats, ints, pinned, qo_indptr, kv_indptr, kv_len, heads, dim, causal):
        assert floats.dtype == ints.dtype == torch.uint8 and pinned.shape == ints.shape
        assert all(x.device.type == "cpu" for x in (qo_indptr, kv_indptr, kv_len))
        assert dim == 512 and not causal
        kept = torch.cat([qo_indptr, kv_indptr, kv_len])
        ints.view(torch.int32)[: len(kept)] = kept
        return [len(kv_len), heads]  # MLAPlan: the launch depends on these two alone

    def run(self, *args):
        self.runs.append(args)
        self.replay(args)

    @staticmethod
    def replay(args):
        """What a replay of the launch does: it reads what its tensors hold now."""
        floats, ints, (batch, planned_heads), q_nope, q_pe, ckv, kpe, indices, out, lse = args[:10]
        mask, heads, page_size, scale, base_e, *scales = args[10:]
        assert (mask, page_size, base_e, scales) == (0, 1, True, [1.0, 1.0, None])
        assert q_nope.shape == (batch, heads, 512) and heads == planned_heads
        kept = ints.view(torch.int32)[: 3 * batch + 2].split([batch + 1, batch + 1, batch])
        qo_indptr, kv_indptr, kv_len = (one.tolist() for one in kept)
        assert qo_indptr == list(range(batch + 1))
        q, rows = torch.cat([q_nope, q_pe], -1), torch.cat([ckv, kpe], -1)[:, 0]
        for t in range(batch):
            own = indices[kv_indptr[t] : kv_indptr[t] + kv_len[t]]
            if own.min() < 0 or own.max() >= len(rows):
                raise IndexError(f"query {t} reads row {int(own.min())} of {len(rows)}")
            one, one_lse = sparse_mla_reference(q[t : t + 1], rows, own[None], scale)
            out[t], lse[t] = one[0].to(out.dtype), one_lse[0].to(lse.dtype)


def stand_in(monkeypatch) -> Module:
    """FlashInfer on a Hopper card that is not there. Returns its compiled module."""
    module, mechanics = Module(), _fa_common._BatchMLAGeneratedFaMechanics
    init = mechanics.__init__

    def unpinned(self, **kwargs):  # page-locked memory needs a device
        assert kwargs.pop("pin_memory_int_workspace_buffer") is None
        ints = kwargs.pop("int_workspace_buffer")
        ints = torch.zeros(8 << 20, dtype=torch.uint8) if ints is None else ints
        kwargs |= {"int_workspace_buffer": ints, "pin_memory_int_workspace_buffer": ints.clone()}
        init(self, **kwargs)

    monkeypatch.setattr(mechanics, "__init__", unpinned)
    for backend in (fa2_backend, fa3_backend):
        monkeypatch.setattr(backend, "get_batch_mla_module", lambda *_: module)
    for owner in (_fa_common, _wrapper):
        monkeypatch.setattr(owner, "get_compute_capability", lambda _: (9, 0))
    monkeypatch.setattr(_fa_common, "is_sm90a_supported", lambda _: True)
    monkeypatch.setattr(_fa_common, "get_device_sm_count", lambda _: HOPPER_SMS)
    monkeypatch.setattr(_fa_common, "_get_fa_shared_memory_limits", lambda _: HOPPER_SHARED_BYTES)
    return module

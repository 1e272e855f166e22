"""SGLang's backend of linear attention layers (KDA) on the CPU: GLM-5.3-Flash's other half.

SGLang's own runs Triton kernels. States, their slots and the snapshots for the radix cache stay
SGLang's (MambaPool); convolution and recurrence are torch and numba.
"""

import torch
from sglang.srt.layers.attention.hybrid_linear_attn_backend import MambaAttnBackendBase

from sglang_ess.cpu.ops.kda import causal_conv, kda, log_decay


class CpuKdaBackend(MambaAttnBackendBase):
    """KDA over SGLang's state pool.

    A slot holds the last width - 1 inputs of the convolution [width - 1, C], and a state
    [H, D, D] float32 between keys and values.
    """

    needs_cpu_seq_lens = False

    def __init__(self, model_runner):
        super().__init__(model_runner)
        conv = self.req_to_token_pool.mamba_pool.mamba_cache.conv[0]
        self.conv_states_shape = conv.transpose(-1, -2).shape

    def forward_decode(self, layer, forward_batch, mixed_qkv, a, b, **kwargs) -> torch.Tensor:
        """One token a request. As forward_extend, with a [B, H * D]."""
        conv, states = self._caches(layer)
        slots = self.forward_metadata.mamba_cache_indices.long()
        window = torch.cat([conv[slots], mixed_qkv.unsqueeze(1).to(conv.dtype)], dim=1)
        conv[slots] = window[:, 1:]
        # The new input enters in full, as in prefill.
        inputs = torch.cat([window[:, :-1].float(), mixed_qkv.unsqueeze(1).float()], dim=1)
        qkv = causal_conv(inputs, layer.conv_weights).squeeze(1)
        never = torch.zeros(len(slots), dtype=torch.int64)
        sequences = torch.arange(len(slots) + 1), slots, never, never
        out = self._attend(layer, qkv, a, b, states, sequences)
        if forward_batch.mamba_track_mask is not None:
            tracked = forward_batch.mamba_track_mask
            kept = self.forward_metadata.mamba_track_indices[tracked]
            conv[kept], states[kept] = conv[slots[tracked]], states[slots[tracked]]
        return out.to(mixed_qkv.dtype)

    def forward_extend(self, layer, forward_batch, mixed_qkv, a, b, **kwargs) -> torch.Tensor:
        """A prefill pass. Returns [1, T, H, D] in mixed_qkv's dtype.

        mixed_qkv [T, 3 * H * D] before the convolution; a [1, T, H * D] before the decay's
        function, b [1, T, H] before the sigmoid
        Effect: the states of the requests advance; where SGLang tracks a request for the radix
        cache, the state at its last page boundary is copied.
        """
        conv, states = self._caches(layer)
        meta = self.forward_metadata
        slots = meta.mamba_cache_indices.long()
        marks = mark_slots = torch.zeros(len(slots), dtype=torch.int64)
        if meta.has_mamba_track_mask:
            aligned = forward_batch.mamba_track_aligned_lens()
            marks = torch.where(forward_batch.mamba_track_mask, aligned, 0)
            mark_slots = torch.where(marks > 0, meta.mamba_track_indices, 0)
        starts = meta.query_start_loc.long()
        fresh = slots[forward_batch.extend_prefix_lens == 0]
        conv[fresh], states[fresh] = 0, 0
        qkv = torch.empty(mixed_qkv.shape)
        for s, slot in enumerate(slots.tolist()):
            own = slice(int(starts[s]), int(starts[s + 1]))
            window = torch.cat([conv[slot].float(), mixed_qkv[own].float()])
            qkv[own] = causal_conv(window, layer.conv_weights)
            width, mark = conv.shape[1], int(marks[s])
            conv[slot] = window[len(window) - width :].to(conv.dtype)
            if mark:
                conv[int(mark_slots[s])] = window[mark : mark + width].to(conv.dtype)
        a, b = a.squeeze(0), b.squeeze(0)
        sequences = starts, slots, marks, mark_slots
        out = self._attend(layer, qkv, a, b, states, sequences)
        return out.to(mixed_qkv.dtype)

    def _caches(self, layer) -> tuple[torch.Tensor, torch.Tensor]:
        cache = self.req_to_token_pool.mamba2_layer_cache(layer.layer_id)
        return cache.conv[0], cache.temporal

    def _attend(self, layer, qkv, a, b, states, sequences) -> torch.Tensor:
        heads, dim = layer.num_v_heads, layer.head_v_dim
        q, k, v = (x.reshape(-1, heads, dim) for x in qkv.chunk(3, dim=-1))
        decay = log_decay(a.reshape(-1, heads, dim), layer.dt_bias, layer.A_log, layer.lower_bound)
        beta = torch.sigmoid(b.reshape(-1, heads).float())
        out = kda(q, k, v, decay, beta, states, sequences)
        return out.unsqueeze(0)

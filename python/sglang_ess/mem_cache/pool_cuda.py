"""The KV pool of a CUDA device in two tiers: pinned host rows, DeviceTiers in front of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from sglang.srt.mem_cache.memory_pool import unwrap_write_loc

from ess_kernels.scatter import scatter_rows
from sglang_ess.layout import PACK_ROWS_CUDA, PLAN_QUERIES_CUDA
from sglang_ess.mem_cache.pool import IDLE_STEPS, EssTokenToKVPool
from sglang_ess.tiers.balance.budgets import Budgets
from sglang_ess.tiers.balance.rebalance import AgeRebalancer
from sglang_ess.tiers.hot_groups_cuda import DeviceTiers
from sglang_ess.tiers.link_probe import LinkProbe
from sglang_ess.tiers.staging_cuda import DeviceStaging
from sglang_ess.tiers.topk_observer import TopkObserver
from sglang_ess.tiers.topk_sample import TopkSample
from sglang_ess.tiers.transfer_stream import TransferStream


class CudaEssTokenToKVPool(EssTokenToKVPool):
    """EssTokenToKVPool whose hot tier is on a CUDA device.

    tier      hot rows, state and scratch of all index groups
    transfer  the stream on which everything that touches the tiers runs, in order

    get_key_buffer gives SGLang's kernels what reading() was given: hot rows or staged ones.
    """

    tier: DeviceTiers
    rebalancers: list[AgeRebalancer]

    def _create_tiers(self) -> None:
        self.transfer = TransferStream(self.device)
        topk = self.capacity.geometry.topk
        moves, hot_rows = self.capacity.geometry.tier.moves, self.capacity.hot_rows
        self.tier = DeviceTiers(
            self.groups, self.kv_buffer, hot_rows, topk, PLAN_QUERIES_CUDA, self.device, moves
        )
        self._moving = [tier for groups, tier in self.tier.parts if moves and len(groups) > 1]
        self.rebalancers = [
            AgeRebalancer(len(tier.caches), hot_rows, tier.max_rows, topk) for tier in self._moving
        ]
        pinned = torch.device(self.device).type == "cuda"
        self.sample = TopkSample(len(self.groups), topk, pinned)
        self._probe = LinkProbe(self.kv_buffer[0], self.device, self.transfer)
        self.staging = DeviceStaging(
            self.kv_buffer, self.capacity.staging_rows, self.device, self.transfer
        )
        # The rows that SGLang's kernels read now, and their staging group in prefill.
        self._reading: torch.Tensor | None = None
        self._group = 0
        # Never replaced: a captured graph holds its address.
        self._places = torch.arange(1, PACK_ROWS_CUDA + 1, device=self.device)

    @property
    def topk_observers(self) -> list[TopkObserver]:
        return [self.sample]

    @property
    def _scratch_bytes(self) -> int:
        return self._probe.nbytes + self._places.nbytes

    def before_decode_step(self, num_queries: int = 0) -> None:
        """Let hot rows move between layers; the main stream then waits for the transfer stream.

        A replayed graph runs on the main stream and does not wait for copies that were issued to
        the transfer stream since its capture.
        """
        super().before_decode_step(num_queries)
        self.transfer.join()

    def _rebalance(self, num_queries: int) -> list[Budgets]:
        """Decide by the ages that were last copied to the host; nobody waits for newer ones."""
        moved = []
        for rebalancer, tier in zip(self.rebalancers, self._moving, strict=True):
            budgets = rebalancer.step(tier.demand(num_queries), tier.age_snapshot())
            if budgets is not None:
                with self.transfer.on_transfer_stream():
                    tier.resize(budgets.rows)
                moved.append(budgets)
        return moved

    def measure_link(self) -> float:
        return self._probe.bytes_per_second()

    def warm(self, group: int, topk: torch.Tensor) -> None:
        with self.transfer.on_transfer_stream():
            slots = topk.to(self.device, non_blocking=True)
            self.hot_caches[group].warm(slots)
            self.transfer.record_stream(slots)

    @contextmanager
    def reading(self, rows: torch.Tensor) -> Iterator[None]:
        """Have get_key_buffer give these rows [n, 1, width] meanwhile."""
        self._reading = rows
        try:
            yield
        finally:
            self._reading = None

    def staged(self, layer_id: int, rows: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        """Stage a prompt batch in a layer. Yields (queries, their staged rows) of each group.

        rows [T, 1, width]: the batch's new tokens in this layer, packed
        Effect: translate_loc_to_hisparse_device answers for the group that was yielded last.
        """
        for index, group in enumerate(self.staging.groups):
            self._group = index
            yield group.queries, self.staging.rows(layer_id - self.start_layer, index, rows)

    def translate_loc_to_hisparse_device(self, slots: torch.Tensor) -> torch.Tensor:
        """SGLang's question in prefill: the places of slots [T, K] int32 in get_key_buffer's rows.

        Queries of other groups get 0; their attention is thrown away. Not -1: kernels that go by
        lengths would read it.
        """
        queries = self.staging.groups[self._group].queries
        places = torch.zeros_like(slots)
        places[queries] = self.staging.places_of(self._group, slots[queries])
        return places

    def get_key_buffer(self, layer_id: int) -> torch.Tensor:
        """Raises: RuntimeError outside reading(): the host tier is no device tensor."""
        if self._reading is None:
            raise RuntimeError(
                f"rows of layer {layer_id} must be read inside reading(): got a reader that knows "
                "one tier only. Report this with the server's options, and add --disable-ess."
            )
        same = self.store_dtype == self.dtype
        return self._reading if same else self._reading.view(self.dtype)

    def pack(self, cache_k_nope: torch.Tensor, cache_k_rope: torch.Tensor) -> torch.Tensor:
        """Latent rows [n, 1, width] as SGLang's own kernels write them, on the device."""
        n, places = len(cache_k_nope), self._places
        if n > len(places):
            places = torch.arange(1, n + 1, device=self.device)
        # Those kernels never write row 0, which is padding's (reserved_skip_index in
        # sglang/kernels/ops/kvcache/mla_buffer.py).
        rows = torch.empty(n + 1, 1, self.kv_cache_dim, dtype=self.store_dtype, device=self.device)
        self._write_mla_kv_buffer(rows, places[:n], cache_k_nope, cache_k_rope)
        return rows[1:]

    def write_prompt(self, layer_id: int, loc: torch.Tensor, rows: torch.Tensor) -> None:
        """Save rows [n, 1, width] of the slots loc [n] int64; make them hot if there is room.

        The first layer of an index group decides which become hot; the others then fill their
        copies of the same hot rows.
        """
        group, position = self.place(layer_id)
        cache = self.hot_caches[group]
        # A copy: SGLang writes the next pass's slots into this tensor, and the main stream does
        # not wait for a prompt's saves at the end of its pass.
        slots = loc.clone()
        with self.transfer.on_transfer_stream():
            scatter_rows(rows, slots, cache.host_layers[position])
            if position == 0:
                cache.install(slots, rows, IDLE_STEPS, first_slot=self.page_size)
            else:
                cache.update(position, slots, rows)
            self.transfer.record_stream(slots, rows)

    # --- SGLang's write paths -----------------------------------------------------------

    def set_mla_kv_buffer(
        self, layer, loc_info, cache_k_nope, cache_k_rope, layer_id_override=None
    ) -> None:
        loc, _, _ = unwrap_write_loc(loc_info)
        layer_id = layer.layer_id if layer_id_override is None else layer_id_override
        self.write_prompt(layer_id, loc, self.pack(cache_k_nope, cache_k_rope))

    def set_kv_buffer(self, layer, loc_info, cache_k, cache_v, layer_id_override=None) -> None:
        latent, rope = cache_k.split([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
        self.set_mla_kv_buffer(layer, loc_info, latent, rope, layer_id_override)

    def get_mla_kv_buffer(self, layer, loc: torch.Tensor, dst_dtype=None):
        """SGLang's dense attention would read a prefix's host rows here. Under ESS none does.

        Raises: NotImplementedError. EssDsaBackend keeps such batches on the absorbed path.
        """
        raise NotImplementedError(
            "prefix rows must be read through staging: got a dense MHA prefill of "
            f"{len(loc)} slots. Report this; --disable-ess serves it."
        )

    def move_kv_cache(self, tgt_loc: torch.Tensor, src_loc: torch.Tensor) -> None:
        """Wait for the device, then copy on the host. SGLang calls it between steps."""
        self.synchronize()
        for rows in self.kv_buffer:
            rows[tgt_loc.view(-1).cpu()] = rows[src_loc.view(-1).cpu()]
        self.index_key_cache.move(tgt_loc, src_loc)
        self.invalidate_slots(tgt_loc)

    def get_cpu_copy(self, indices, *args, **kwargs):
        self.synchronize()
        return super().get_cpu_copy(indices.cpu(), *args, **kwargs)

    def load_cpu_copy(self, kv_cache_cpu, indices, *args, **kwargs) -> None:
        self.synchronize()
        super().load_cpu_copy(kv_cache_cpu, indices.cpu(), *args, **kwargs)

    def invalidate_slots(self, loc: torch.Tensor) -> None:
        with self.transfer.on_transfer_stream():
            slots = loc.view(-1).to(self.device)
            self.tier.invalidate(slots)
            self.transfer.record_stream(slots)

    def synchronize(self) -> None:
        """Wait until all rows that were written are in the host tier."""
        self.transfer.join()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

"""The KV pool of a CUDA device in two tiers: pinned host rows, DeviceTiers in front of them.

Ranks of a node share one host tier (HostTier.group). Its writer stores host rows; a reader packs
the same rows for its own hot tier alone. Hot tiers differ from rank to rank, even after equal
steps.

What keeps a reader from a row that is not there yet, or is another request's already, are the
reductions of the model itself. Attention TP splits the heads, so every layer ends in one, and no
rank's main stream passes it before all have come to it.

a. Written, then read. A decode step stores its rows on the main stream, before the layer's
   reduction, and no plan of this step fetches a reserved row. The transfer stream saves a prompt's
   rows; the main stream waits for a layer's save two layers later (pack_staged) and for the last
   ones before it leaves the last layer (write_prompt). Prefill attends to its own new rows as each
   rank has packed them. So when a reader begins a pass, all rows of the passes before are there.
   Its warm-up alone reads rows of the same pass: SAVE_LAYERS layers later, or after a meeting of
   the ranks at the last layer (warm_prompt).
b. Where a step's new rows have no hot rows, its plans fetch them in the layer that writes them.
   The ranks meet between (TwoTierDecode.write). DeviceTier.has_room goes by shapes alone, so all
   ranks meet or none does.
c. Read, then overwritten. A main stream waits for every fetch before it attends to its rows. When
   the writer's passes the last reduction of a pass, no rank fetches for that pass any more. What
   is fetched for later (a warm-up, the link's probe) may see a row that is half overwritten. The
   rank itself then writes that slot too, and refreshes its hot row behind that fetch.

Stores to host memory end with a fence for other devices (ess_kernels.checks.publish). Changes by
the CPU (move_kv_cache, load_cpu_copy) go by HostTier.order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from sglang.srt.mem_cache.memory_pool import unwrap_write_loc
from sglang.srt.runtime_context import get_parallel

from ess_kernels.gather_rows import gather_rows
from ess_kernels.pack_write import pack_write, packable
from ess_kernels.scatter import scatter_rows
from sglang_ess.layout import PLAN_QUERIES_CUDA
from sglang_ess.mem_cache.pool import IDLE_STEPS, EssTokenToKVPool, slots_at
from sglang_ess.tiers.hot_groups_cuda import DeviceTiers
from sglang_ess.tiers.link_probe import LinkProbe
from sglang_ess.tiers.staging_cuda import DeviceStaging
from sglang_ess.tiers.topk_observer import TopkObserver
from sglang_ess.tiers.topk_sample import TopkSample
from sglang_ess.tiers.transfer_stream import TransferStream, wait

ABOVE_ALL_SLOTS = 2**31 - 1
# So many layers after a prompt's layer every rank's main stream is behind the writer's save of it:
# pack_staged waits for the save two layers later, and that layer's reduction follows.
SAVE_LAYERS = 3


class CudaEssTokenToKVPool(EssTokenToKVPool):
    """EssTokenToKVPool whose hot tier is on a CUDA device.

    tier      hot rows, state and scratch of all index groups
    transfer  the stream of plans, fetches and a prompt's saves, in order
    prompt_slots [n] int64: a copy of the slots that the prefill pass under way writes
    is_shared    other ranks have the same host tier; is_writer: this one stores its rows

    get_key_buffer gives SGLang's kernels what reading() was given: hot rows or staged ones.
    """

    tier: DeviceTiers

    def _create_tiers(self) -> None:
        group = self.host_tier.group
        self.is_shared, self.is_writer = group.size > 1, group.is_writer
        self._met = torch.zeros(4, device=self.device) if self.is_shared else None  # 16 bytes
        self._to_warm: list[tuple[int, torch.Tensor]] = []  # layers and top-k, in order
        self.transfer = TransferStream(self.device)
        self.prompt_slots = torch.empty(0, dtype=torch.int64, device=self.device)
        topk, hot_rows = self.capacity.geometry.topk, self.capacity.hot_rows
        self.tier = DeviceTiers(
            self.groups, self.kv_buffer, hot_rows, topk, PLAN_QUERIES_CUDA, self.device
        )
        pinned = torch.device(self.device).type == "cuda"
        self.sample = TopkSample(len(self.groups), topk, pinned, self.capacity.geometry.queries)
        self._probe = LinkProbe(self.kv_buffer[0], self.device, self.transfer)
        self.staging = DeviceStaging(
            self.kv_buffer, self.capacity.staging_rows, self.device, self.transfer
        )
        # The rows that SGLang's kernels read now, and their staging group in prefill.
        self._reading: torch.Tensor | None = None
        self._group = 0
        # By staging buffer: when the rows that were packed there last were saved.
        self._saved: list[torch.cuda.Event | None] = [None, None]

    @property
    def topk_observers(self) -> list[TopkObserver]:
        return [self.sample]

    @property
    def _scratch_bytes(self) -> int:
        return self._probe.nbytes

    def before_decode_step(self) -> None:
        """Have the main stream wait for the transfer stream.

        A replayed graph runs on the main stream and does not wait for copies that were issued to
        the transfer stream since its capture.
        """
        super().before_decode_step()
        self.transfer.join()

    def measure_link(self) -> float:
        return self._probe.bytes_per_second()

    def warm_request(self, table_row: torch.Tensor, positions: Sequence[torch.Tensor]) -> None:
        """One copy to the device for all groups, from pinned memory: the host waits for nothing."""
        sizes = [len(one) for one in positions]
        together = torch.cat([*positions])
        if torch.device(self.device).type == "cuda":
            together = together.pin_memory()
        with self.transfer.on_transfer_stream():
            topk = slots_at(table_row, together.to(self.device, non_blocking=True))
            for cache, part in zip(self.hot_caches, topk.split(sizes), strict=True):
                if len(part):
                    cache.warm(part)

    def meet(self) -> None:
        """Have the main stream wait until those of all ranks of the attention-TP group are here."""
        get_parallel().attn_tp_group.all_reduce(self._met)

    def warm_prompt(self, layer_id: int, topk: torch.Tensor) -> None:
        """Warm an index group by a prompt's last queries, when their rows are in the host tier.

        layer_id: the group's last one; topk [queries, K] int32, which nobody writes any more
        """
        self._to_warm.append((layer_id, topk))
        ends = layer_id - self.start_layer == self.layer_num - 1
        if self.is_shared and ends:
            self.meet()
        behind = SAVE_LAYERS if self.is_shared and not ends else 0
        while self._to_warm and self._to_warm[0][0] + behind <= layer_id:
            layer, queries = self._to_warm.pop(0)
            with self.transfer.on_transfer_stream():
                self.hot_caches[self.place(layer)[0]].warm(queries)
                self.transfer.record_stream(queries)

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
        return self.staging.translate(self._group, slots)

    def get_key_buffer(self, layer_id: int) -> torch.Tensor:
        """Raises: RuntimeError outside reading(): the host tier is no device tensor."""
        if self._reading is None:
            raise RuntimeError(
                f"rows of layer {layer_id} must be read inside reading(): got a reader that knows "
                "one tier only. Report this with the server's options, and add --disable-ess."
            )
        same = self.store_dtype == self.dtype
        return self._reading if same else self._reading.view(self.dtype)

    def begin_prompts(
        self,
        prefix_tokens: Sequence[int],
        new_tokens: Sequence[int],
        tables: torch.Tensor,
        slots: torch.Tensor,
    ) -> None:
        """Begin a prefill pass: stage its requests, and give its new slots free or idle hot rows.

        slots [sum(new_tokens)] int64, in query order; the others: DeviceStaging.begin
        Every layer of the pass must be written: write_prompt fills the hot rows.
        """
        self._to_warm.clear()  # of a pass that was given up
        for saved in self._saved:  # of the pass before, from the buffers that this one fills
            wait(saved)
        self.staging.begin(prefix_tokens, new_tokens, tables, slots)
        # A copy: SGLang writes the next pass's slots into this tensor, and the main stream does
        # not wait for a prompt's saves at the end of its pass.
        self.prompt_slots = slots.clone()
        with self.transfer.on_transfer_stream():
            self.tier.install(self.prompt_slots, IDLE_STEPS, self.page_size)
            self.transfer.record_stream(self.prompt_slots)

    def pack(
        self,
        latents: torch.Tensor,
        rope_keys: torch.Tensor,
        loc: torch.Tensor,
        rows: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Latent rows [n, 1, width] as SGLang's own kernels write them, on the device.

        latents [n, 1, 512], rope_keys [n, 1, r], loc [n]: their slots, which are not written
        rows: where they go; None: into a new tensor
        """
        if rows is None:
            shape = len(latents), 1, self.kv_cache_dim
            rows = torch.empty(shape, dtype=self.store_dtype, device=self.device)
        cache = self.hot_caches[0]
        pack_write(
            *packable(latents, rope_keys, rows), loc, cache.state.slot_row, cache.rows,
            cache.host_rows, first_slot=ABOVE_ALL_SLOTS, packed=rows,
        )  # fmt: skip
        return rows

    def pack_staged(
        self, layer_id: int, latents: torch.Tensor, rope_keys: torch.Tensor, loc: torch.Tensor
    ) -> torch.Tensor:
        """pack() into the staging buffer, where all of the batch's rows fit into one."""
        index = layer_id - self.start_layer
        wait(self._saved[index % 2])  # the rows that were packed there two layers ago
        rows = self.staging.place_for(index, len(latents))
        return self.pack(latents, rope_keys, loc, rows)

    def write_prompt(self, layer_id: int, slots: torch.Tensor, rows: torch.Tensor) -> None:
        """Save rows [n, 1, width] of slots [n] int64, and refresh those that are hot.

        slots: nobody writes this tensor before the save is done, as in prompt_slots
        """
        group, position = self.place(layer_id)
        cache = self.hot_caches[group]
        with self.transfer.on_transfer_stream():
            if self.is_writer:
                host_rows = cache.host_layers[position]
                scatter_rows(rows, slots, host_rows, publishes=self.is_shared)
            targets = gather_rows(slots.int(), cache.state.slot_row)
            scatter_rows(rows, targets, cache.hot_layers[position])
            self.transfer.record_stream(slots, rows)
            self._saved[(layer_id - self.start_layer) % 2] = self.transfer.event()
        if self.is_shared and layer_id - self.start_layer == self.layer_num - 1:
            self.transfer.join()

    # --- SGLang's write paths -----------------------------------------------------------

    def set_mla_kv_buffer(
        self, layer, loc_info, cache_k_nope, cache_k_rope, layer_id_override=None
    ) -> None:
        loc, _, _ = unwrap_write_loc(loc_info)
        layer_id = layer.layer_id if layer_id_override is None else layer_id_override
        rows = self.pack(cache_k_nope, cache_k_rope, loc)
        self.write_prompt(layer_id, loc.clone(), rows)

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

        def move() -> None:
            for rows in self.kv_buffer:
                rows[tgt_loc.view(-1).cpu()] = rows[src_loc.view(-1).cpu()]

        self.change_rows(move)
        self.index_key_cache.move(tgt_loc, src_loc)
        self.invalidate_slots(tgt_loc)

    def get_cpu_copy(self, indices, *args, **kwargs):
        self.synchronize()
        return super().get_cpu_copy(indices.cpu(), *args, **kwargs)

    def load_cpu_copy(self, kv_cache_cpu, indices, *args, **kwargs) -> None:
        load = partial(super().load_cpu_copy, kv_cache_cpu, indices.cpu(), *args, **kwargs)
        self.change_rows(load)
        if self.is_writer:
            return
        # Index keys are each rank's own. SGLang passes over layers without rows.
        host_rows, self.kv_buffer = self.kv_buffer, [rows[:0] for rows in self.kv_buffer]
        try:
            load()
        finally:
            self.kv_buffer = host_rows

    def change_rows(self, change: Callable[[], None]) -> None:
        """Have the writer change host rows by the CPU, while no rank's device or CPU reads any."""
        self.synchronize()
        self.host_tier.order.begin()
        self.host_tier.order.write(change)

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

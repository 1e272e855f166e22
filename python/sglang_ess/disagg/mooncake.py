"""Mooncake, where several decode ranks share one host tier: a prompt's rows cross once.

SGLang sends all latent rows to every decode rank. The ranks of a node that have the same rows keep
them in one host tier, so that each row would arrive once for each rank, at the same place. Here a
rank says in its registration which share of the layers it takes, and is sent no other. Index keys,
a draft model's rows and metadata go to every rank, which has its own.

All rows of a request are there before any is read: a rank has its share when its transfer is done,
and SGLang lets a request join when the transfers to all ranks of its attention-TP group are done
(poll_and_all_reduce in sglang/srt/disaggregation/utils.py takes the least of their states). The
slots of a request that is aborted are free when no prefill rank writes to any decode rank any more
(resolve_deferred_releases in sglang/srt/disaggregation/decode.py agrees on that in the same way).

A prefill server without ESS knows no shares and sends every row to each rank. That is slower and
does no harm: until the request joins, no rank reads the rows and nobody else owns their slots, and
all copies are of the same row.
"""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

from sglang.srt.disaggregation.mooncake.conn import MooncakeKVManager

# Follows the lengths of the buffers' items in a registration, which are far smaller numbers.
# Without ESS, a prefill server reads those lengths only for a decode server with --dcp-size.
SHARE = struct.Struct("3Q")
WORD = int.from_bytes(b"ESSshare", "little")


class Share(NamedTuple):
    """The layers that a rank of a shared host tier is sent: one of as many parts as it has ranks.

    part: this rank's, from 0
    """

    part: int = 0
    parts: int = 1

    def entries(self, num_layers: int, num_drafts: int) -> list[int]:
        """Of the transfer's buffers, those sent: a range of the layers, and all draft layers."""
        first, end = (i * num_layers // self.parts for i in (self.part, self.part + 1))
        return [*range(first, end), *range(num_layers, num_layers + num_drafts)]


class EssMooncakeKVManager(MooncakeKVManager):
    """SGLang's manager of transfers, on decode and prefill ranks."""

    def build_receiver_registration_message(self) -> list[bytes]:
        """Decode: SGLang's message; this rank's share is in the last part."""
        *parts, item_lengths = super().build_receiver_registration_message()
        share = Share(*getattr(self.kv_args, "host_tier_share", ()))
        if share.parts > 1:
            item_lengths += SHARE.pack(WORD, *share)
        return [*parts, item_lengths]

    def _send_kvcache_generic(self, mooncake_session_id: str, **arguments: Any) -> int:
        """Prefill: send the entries of a list of buffers to a rank, of latent rows its share."""
        share = share_of(self.decode_kv_args_table[mooncake_session_id])
        # Other states are index keys. Layer ids are those of a pool with linear attention.
        of_rows = arguments.get("state_type") is None and not arguments.get("src_layer_ids")
        if share.parts > 1 and of_rows:
            source, target, number = self.get_mla_kv_ptrs_with_pp(
                arguments["src_data_ptrs"], arguments["dst_data_ptrs"]
            )
            drafts = self.kv_args.num_draft_entries
            sent = share.entries(number - drafts, drafts)
            if not sent:
                return 0
            arguments |= dict(
                src_data_ptrs=[source[i] for i in sent],
                dst_data_ptrs=[target[i] for i in sent],
                item_lens=[arguments["item_lens"][i] for i in sent],
            )
        return super()._send_kvcache_generic(mooncake_session_id, **arguments)


def share_of(registration: Any) -> Share:
    """The share in a decode rank's KVArgsRegisterInfo; all layers if it names none."""
    extra = registration.dst_kv_item_lens[len(registration.dst_kv_ptrs) :]
    if len(extra) != 3 or extra[0] != WORD or not extra[1] < extra[2]:
        return Share()
    return Share(extra[1], extra[2])

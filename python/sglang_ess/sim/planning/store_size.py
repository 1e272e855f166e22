"""How much of a disk prefixes take that --ess-store keeps: whole files, with headers."""

from __future__ import annotations

from sglang_ess.layout import PAGE_SLOTS
from sglang_ess.sim.inputs.specs import Model
from sglang_ess.store.object_file import ObjectFormat


def stored_bytes(model: Model, tokens: int, drafts: bool) -> int:
    """Bytes that a prefix takes of the store's limit: its whole pages, as the limit counts them.

    drafts: whether the model's MTP layers draft, and so have rows and keys of their own
    """
    rows, keys = model.row_bytes * PAGE_SLOTS, model.index_bytes * PAGE_SLOTS
    parts = [rows] * model.layers + [keys] * len(model.groups)
    parts += [rows, keys] * (model.mtp_layers if drafts else 0)
    return tokens // PAGE_SLOTS * ObjectFormat("", parts).charged_bytes

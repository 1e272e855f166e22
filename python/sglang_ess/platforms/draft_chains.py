"""Hook bodies for speculative decoding with chains of drafts, on every platform."""

from __future__ import annotations

from typing import Any

import numpy as np


def use_chains() -> None:
    """On a GPU: let NGRAM's drafts be chains, if the server uses it.

    Raises: Refusal where SGLang is not as the contract has it.
    """
    from sglang.srt.runtime_context import get_spec

    from ess_patches import contract, speculation

    if get_spec().speculative_algorithm == "NGRAM":
        contract.register_late(speculation.NGRAM_HOOKS, "cuda")


def padded_as_chain(
    drafts: tuple[np.ndarray, np.ndarray], corpus: Any, *args: Any, **kwargs: Any
) -> tuple[np.ndarray, np.ndarray]:
    """AFTER NgramCorpus.batch_get: every request's drafts follow one another, padding too.

    drafts: tokens [bs * D] and the mask [bs * D * D] of the nodes that each node follows
    """
    tokens, mask = drafts
    width = corpus.draft_token_num
    chains = np.broadcast_to(np.tri(width, dtype=mask.dtype), (len(tokens) // width, width, width))
    return tokens, chains.reshape(mask.shape)


def keep_accepted_rows(*args: Any, **kwargs: Any) -> None:
    """In the place of move_accept_tokens_to_target_kvcache: a chain's accepted rows are in place.

    The launcher refuses trees of drafts.
    """

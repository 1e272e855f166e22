"""transformers' GLM-5.3-Flash as the oracle: its indexer chooses pools of positions."""

from contextlib import contextmanager

import numpy as np
import torch
from transformers import AutoModelForImageTextToText

from sglang_ess.layout import LATENT_DIM
from tests.support.oracle import Oracle, _forced


class PooledOracle(Oracle):
    """A tiny glm5_next checkpoint in transformers, its text model alone."""

    def __init__(self, path, dtype=torch.float32):
        self.model = AutoModelForImageTextToText.from_pretrained(
            str(path), dtype=dtype, attn_implementation="eager"
        ).eval()
        text = self.model.model.language_model
        self.config, self.layers = text.config, text.layers
        self.pool = self.config.index_kpool
        self.topk = self.config.index_topk // self.pool

    def selection_of(self, selected):
        """The pools. Raises: AssertionError where positions are not whole pools and the tail."""
        return {query: self._pools(query, positions) for query, positions in selected.items()}

    def _pools(self, query, positions):
        complete = (query + 1) // self.pool
        pools = np.unique(positions[positions < complete * self.pool] // self.pool)
        whole = (pools[:, None] * self.pool + np.arange(self.pool)).ravel()
        expected = np.concatenate([whole, np.arange(complete * self.pool, query + 1)])
        assert sorted(positions) == expected.tolist(), (query, positions, expected)
        return pools

    @contextmanager
    def _rows(self, forced, verdict):
        """Note the normed latents, which are the whole row, and force them."""

        def note_latent(layer):
            def hook(norm, inputs, output):
                verdict.rows[layer] = output.reshape(-1, LATENT_DIM).float()
                return _forced(output, forced.get(layer, {}), slice(0, LATENT_DIM))

            return hook

        hooks = [
            attention.kv_a_layernorm.register_forward_hook(note_latent(layer))
            for layer, attention in self.attentions()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

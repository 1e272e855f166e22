"""SparseServe's setting: the KV blocks of attention heads are selected and cached.

The models have MHA or GQA with block-level selection, not latent rows with token-level top-k. The
cache is a production HotCache whose slots are blocks. It stands for one sampled head and has that
head's share of the device memory, because SparseServe manages memory per head (section 3.1).
Costs are a roofline.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numba
import numpy as np

from sglang_ess.sim.inputs.files import POSITIVE, SHARE, Checked, read, spec

BYTES = 2  # of a bf16 value
MAX_AGE = 1 << 16  # longest window, in steps, of the table of working sets


@dataclass(frozen=True)
class BlockMachine(Checked):
    """One GPU, its host and the link. benchmarks/sim/sparseserve.toml names the sources."""

    hbm_bytes: int = spec(POSITIVE)
    hbm_bytes_per_second: float = spec(POSITIVE)
    dram_bytes: int = spec(POSITIVE)
    flops: float = spec(POSITIVE)
    compute_efficiency: float = spec(SHARE)
    memory_share: float = spec(SHARE)
    workspace_bytes: int = spec(POSITIVE)
    memcpy_bytes_per_second: float = spec(POSITIVE)
    memcpy_save_bytes_per_second: float = spec(POSITIVE)
    flash_h2d_bytes_per_second: float = spec(POSITIVE)
    flash_d2h_bytes_per_second: float = spec(POSITIVE)


@dataclass(frozen=True)
class Sparse(Checked):
    """Block selection: a query attends to budget_tokens in blocks of block_tokens."""

    block_tokens: int = spec(POSITIVE)
    budget_tokens: int = spec(POSITIVE)
    chunk_tokens: int = spec(POSITIVE)
    metadata_share: float = spec(SHARE)
    overlap_rise_1_to_12: float = spec(SHARE)
    overlap_rise_12_to_16: float = spec(SHARE)

    @property
    def topk(self) -> int:
        """Blocks of one query and head."""
        return self.budget_tokens // self.block_tokens


@dataclass(frozen=True)
class GoodputLimits(Checked):
    """Limits that a request rate must keep to count as goodput."""

    tbt_decode_steps: float = spec(POSITIVE)
    queue_seconds: float = spec(POSITIVE)


@dataclass(frozen=True)
class DenseModel(Checked):
    """A transformer with MHA or GQA in bf16."""

    name: str = spec()
    layers: int = spec(POSITIVE)
    kv_heads: int = spec(POSITIVE)
    hidden: int = spec(POSITIVE)
    head_dim: int = spec(POSITIVE)
    parameters: float = spec(POSITIVE)
    max_prompt_tokens: int = spec(POSITIVE)

    @property
    def weight_bytes(self) -> float:
        return BYTES * self.parameters

    @property
    def heads(self) -> int:
        """KV heads of all layers. Each has a cache; together they share the device memory."""
        return self.layers * self.kv_heads

    @property
    def token_bytes(self) -> int:
        """Keys and values of one token."""
        return 2 * BYTES * self.heads * self.head_dim


@dataclass(frozen=True)
class Dataset(Checked):
    """One data set of the load."""

    name: str = spec()
    words: float = spec(POSITIVE)
    samples: int = spec(POSITIVE)
    output_tokens: int = spec(POSITIVE)


@dataclass(frozen=True)
class WordLengths(Checked):
    """How words become tokens, and how prompt lengths vary."""

    tokens_per_word: float = spec(POSITIVE)
    length_sigma: float = spec(POSITIVE)


@dataclass(frozen=True)
class Setting:
    """The contents of a file like benchmarks/sim/sparseserve.toml."""

    machine: BlockMachine
    sparse: Sparse
    limits: GoodputLimits
    workload: WordLengths
    models: tuple[DenseModel, ...]
    datasets: tuple[Dataset, ...]

    @classmethod
    def load(cls, path: Path | str) -> Setting:
        """Read a file. Raises: SpecError, one line with file, line and field."""
        return read(path, cls)

    def draw(self, count: int, max_tokens: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Draw prompt and output tokens, [count] int64 each. Prompts are cut at max_tokens."""
        rng = np.random.default_rng(seed)
        weights = np.array([d.samples for d in self.datasets], float)
        picks = rng.choice(len(weights), count, p=weights / weights.sum())
        means = np.array([d.words for d in self.datasets])[picks] * self.workload.tokens_per_word
        sigma = self.workload.length_sigma
        prompts = means * rng.lognormal(-(sigma**2) / 2, sigma, count)
        prompts = np.clip(prompts, self.sparse.block_tokens, max_tokens).astype(np.int64)
        return prompts, np.array([d.output_tokens for d in self.datasets])[picks]

    def cache_bytes(self, model: DenseModel) -> float:
        """Device bytes left for KV and its metadata. Raises: ValueError if there are none."""
        usable = self.machine.memory_share * self.machine.hbm_bytes
        left = usable - model.weight_bytes - self.machine.workspace_bytes
        if left <= 0:
            raise ValueError(
                f"device memory must hold the weights of {model.name}: got {usable:.3g} B, limit "
                f"{model.weight_bytes + self.machine.workspace_bytes:.3g} B."
            )
        return left

    def block_bytes(self, model: DenseModel) -> int:
        """Bytes of one head's block, keys and values."""
        return self.sparse.block_tokens * 2 * BYTES * model.head_dim


# --- time -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Roofline:
    """Seconds of the parts of one iteration."""

    machine: BlockMachine
    model: DenseModel
    sparse: Sparse

    @property
    def _flops(self) -> float:
        return self.machine.flops * self.machine.compute_efficiency

    def linear(self, tokens: float) -> float:
        """Everything but attention for `tokens` tokens: reading weights, or computing."""
        read_seconds = self.model.weight_bytes / self.machine.hbm_bytes_per_second
        return max(read_seconds, 2 * self.model.parameters * tokens / self._flops)

    def prefill_attention(self, tokens: float, prefix: float, reread: bool = True) -> float:
        """Causal attention of `tokens` tokens after a prefix.

        reread: read the prefix's keys and values from device memory, as each chunk does
        """
        pairs = tokens * (prefix + tokens / 2)
        seconds = 4 * self.model.hidden * self.model.layers * pairs / self._flops
        read = prefix * self.model.token_bytes if reread else 0.0
        return seconds + read / self.machine.hbm_bytes_per_second

    def decode_attention(self, contexts: np.ndarray, is_sparse: bool) -> float:
        """Attention of n requests. contexts [n]: tokens. Sparse reads the budget and metadata."""
        tokens = contexts
        if is_sparse:
            tokens = np.minimum(contexts, self.sparse.budget_tokens)
            tokens = tokens + self.sparse.metadata_share * contexts
        return float(tokens.sum()) * self.model.token_bytes / self.machine.hbm_bytes_per_second


# --- locality ---------------------------------------------------------------------------


def overlap_law(rise_1_to_12: float, rise_12_to_16: float) -> tuple[float, float]:
    """Fit (A, p) of R(w) = A w^-p, the share of misses beyond a window of w steps.

    The text of SparseServe's figure 8 states R(1) - R(12) and R(12) - R(16). A power law that
    ends at zero needs no third number. So after its first step a request selects no block that
    it has not selected before.
    Raises: ValueError if no p in (0, 8) gives the ratio of the two rises.
    """

    def ratio(p: float) -> float:
        return (12**-p - 16**-p) / (1 - 12**-p)

    low, high, goal = 1e-6, 8.0, rise_12_to_16 / rise_1_to_12
    if not ratio(high) < goal < ratio(low):
        raise ValueError(
            f"overlap rises must be a power law's: got {rise_1_to_12} and {rise_12_to_16}, ratio "
            f"{goal:.3g}, limits {ratio(high):.3g} and {ratio(low):.3g}."
        )
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if ratio(middle) > goal else (low, middle)
    return rise_1_to_12 / (1 - 12**-low), low


def working_sets(amplitude: float, power: float, topk: int) -> np.ndarray:
    """Return [MAX_AGE] distinct blocks of windows of 1, 2, ... steps, which grow by R(w)."""
    misses = amplitude * np.arange(1.0, MAX_AGE) ** -power
    return topk * np.concatenate([[1.0], 1 + np.cumsum(misses)])


@numba.njit(cache=True, nogil=True)
def _advance(
    stacks: np.ndarray,
    blocks: np.ndarray,
    active: np.ndarray,
    amplitude: float,
    power: float,
    sets: np.ndarray,
    rng: np.random.Generator,
    out: np.ndarray,
) -> None:
    """Run one step: out[i] = the blocks that stream active[i] selects. Reorders its stack.

    A stack holds a request's blocks, last selected first. Each of the top k stays with
    probability 1 - A. Otherwise the block comes whose depth in the stack is the working set of
    a window drawn by the law (Mattson's stack model).
    """
    topk = out.shape[1]
    buffer = np.empty(stacks.shape[1], np.int32)
    is_new = np.zeros(stacks.shape[1], np.bool_)
    for i in range(active.shape[0]):
        stack, count = stacks[active[i]], blocks[active[i]]
        out[i] = -1
        if count <= topk:
            out[i, :count] = stack[:count]
            continue
        is_new[:count] = False
        taken = 0
        for _ in range(topk):
            if rng.random() >= amplitude or taken == count - topk:
                continue
            age = (1.0 - rng.random()) ** (-1.0 / power)
            whole = min(int(age), sets.shape[0] - 1)
            depth = sets[whole - 1]
            depth += (sets[whole] - depth) * min(1.0, age - whole)
            place = topk + (int(depth) - topk) % (count - topk)
            while is_new[place]:
                place = topk + (place + 1 - topk) % (count - topk)
            is_new[place] = True
            buffer[taken] = stack[place]
            taken += 1
        # As many of the old top k leave, chosen at random. They lie right below the new top k.
        kept, stays, dropped = taken, topk - taken, topk
        for place in range(topk):
            left = topk - place
            if rng.random() * left < stays - (kept - taken):
                buffer[kept] = stack[place]
                kept += 1
            else:
                buffer[dropped] = stack[place]
                dropped += 1
        for place in range(topk, count):
            if not is_new[place]:
                buffer[dropped] = stack[place]
                dropped += 1
        stack[:count] = buffer[:count]
        out[i] = stack[:topk]


class BlockStreams:
    """The blocks that one head of each request selects, step by step.

    max_requests: at once; max_blocks: of one request
    Selection is over the prompt only. The few blocks that decode appends are left out.
    """

    def __init__(self, sparse: Sparse, max_requests: int, max_blocks: int, seed: int):
        law = overlap_law(sparse.overlap_rise_1_to_12, sparse.overlap_rise_12_to_16)
        self.amplitude, self.power = law
        self.topk = sparse.topk
        self._sets = working_sets(*law, self.topk)
        self._rng = np.random.default_rng(seed)
        self._stacks = np.zeros((max_requests, max_blocks), np.int32)
        self._blocks = np.zeros(max_requests, np.int64)

    def join(self, stream: int, blocks: int) -> None:
        """Give the stream to a request of `blocks` blocks, in random order."""
        self._blocks[stream] = blocks
        self._stacks[stream, :blocks] = self._rng.permutation(blocks)

    def step(self, active: np.ndarray) -> np.ndarray:
        """[n, topk] int32 blocks of the streams active [n] int64; -1 pads short prompts."""
        out = np.empty((len(active), self.topk), np.int32)
        _advance(
            self._stacks, self._blocks, active, self.amplitude, self.power, self._sets,
            self._rng, out,
        )  # fmt: skip
        return out

"""The CPU platform's kernels of speculative decoding against SGLang's own, in Triton's interpreter.

Each writes into poisoned memory: what a kernel leaves as it was must stay so here too.
"""

import itertools

import pytest
import torch
from sglang.kernels.ops.memory.common import get_last_loc_triton
from sglang.kernels.ops.sampling import renorm_triton
from sglang.kernels.ops.speculative import cache_locs, eagle, spec_tree
from sglang.kernels.ops.speculative.reject_sampling import chain_speculative_sampling_triton
from sglang.srt.mem_cache import allocation
from sglang.srt.utils import next_power_of_2

from ess_kernels.checks import interpreted
from sglang_ess.cpu import speculation

pytestmark = pytest.mark.skipif(not interpreted(), reason="needs TRITON_INTERPRET=1")
POISON = -7
SIZES = [(1, 1), (1, 8), (2, 3), (3, 2), (5, 4), (6, 8), (4, 1)]  # batch, D


def random(seed):
    return torch.Generator().manual_seed(seed)


def outputs(bs, width, room=None):
    """(predicts, accept_index, accept_token_num), poisoned."""
    shapes = (bs * width,), (bs, room or width), (bs,)
    return [torch.full(shape, POISON, dtype=torch.int32) for shape in shapes]


def links(bs, width):
    """The links of chains by SGLang's kernel, and the positions, of sequences of 10 i tokens."""
    found = [torch.full((bs, width), -1) for _ in range(3)]
    positions = torch.full((bs * width,), POISON)
    seq_lens, mask = 10 * torch.arange(bs), torch.ones(bs * width * width, dtype=torch.bool)
    parents, scores = chain_parents(bs, width)
    spec_tree.sgl_build_tree_kernel_triton(
        parents, scores, seq_lens, mask, positions, *found, 1, width - 1, width,
        spec_tree.TreeMaskMode.QLEN_ONLY,
    )  # fmt: skip
    return found, positions, mask


def chain_parents(bs, width):
    """What SGLang's draft loop gives for one draft a step: parents -1, 0, 1.., scores 0, 1, 2.."""
    steps = torch.arange(max(1, width - 1))
    return (steps - 1).repeat(bs, 1), steps.repeat(bs, 1)


@pytest.mark.parametrize("bs, width", SIZES)
def test_build_chain(bs, width):
    expected, positions, _ = links(bs, width)
    found = [torch.full((bs, width), POISON) for _ in range(3)]
    ours = torch.full((bs * width,), POISON)
    seq_lens = 10 * torch.arange(bs)
    speculation.build_chain(None, None, seq_lens, None, ours, *found, 1, width - 1, width, None)
    assert torch.equal(ours, positions)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("bs, width", SIZES)
def test_the_kernel_makes_the_mask_of_a_chain_a_triangle(bs, width):
    """Why the sparse backend may take a node's position for its mask."""
    _, _, mask = links(bs, width)
    assert torch.equal(
        mask.view(bs, width, width), torch.ones(width, width).tril().bool().repeat(bs, 1, 1)
    )


@pytest.mark.parametrize("bs, width", SIZES)
@pytest.mark.parametrize("vocab", [1, 2, 40])  # all accepted, some, hardly one
@pytest.mark.parametrize("narrower", [0, 1])  # accept_index than D
def test_verify_chain(bs, width, vocab, narrower):
    g = random(bs * 100 + width)
    tokens = [torch.randint(0, vocab, (bs, width), generator=g) for _ in range(2)]
    room = max(1, width - narrower)
    expected, found = outputs(bs, width, room), outputs(bs, width, room)
    chain, _, _ = links(bs, width)
    spec_tree.verify_tree_greedy_triton(*expected, tokens[0], *chain, tokens[1])
    names = ("predicts", "accept_index", "accept_token_num")
    speculation.verify_chain(
        **dict(zip(names, found, strict=True)), candidates=tokens[0], target_predict=tokens[1]
    )
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def distributions(bs, width, vocab, seed):
    """Target probabilities with exact zeros and ones among them, drafts and coins."""
    g = random(seed)
    probs = torch.rand(bs, width, vocab, generator=g)
    probs = torch.where(torch.rand(bs, width, vocab, generator=g) < 0.3, 0, probs)
    probs[..., 0] += 1e-3
    sure = torch.nn.functional.one_hot(torch.randint(0, vocab, (bs, width), generator=g), vocab)
    probs = torch.where(torch.rand(bs, width, 1, generator=g) < 0.2, sure.float(), probs)
    probs /= probs.sum(2, keepdim=True)
    drafts = torch.multinomial(probs.view(-1, vocab), 1, generator=g).view(bs, width).roll(1, 1)
    other = torch.randint(0, vocab, (bs, width), generator=g)
    drafts = torch.where(torch.rand(bs, width, generator=g) < 0.2, other, drafts)
    coins = torch.rand(bs, width, generator=g)
    coins[torch.rand(bs, width, generator=g) < 0.1] = 0  # torch.rand gives it too
    return probs, drafts, coins, torch.rand(bs, generator=g)


def sample(found, probs, drafts, coins, last_coins, thresholds=(1.0, 1.0)):
    names = ("predicts", "accept_index", "accept_token_num")
    speculation.sample_chain(
        **dict(zip(names, found, strict=True)), candidates=drafts, target_probs=probs,
        uniform_samples=coins, uniform_samples_for_final_sampling=last_coins,
        threshold_single=thresholds[0], threshold_acc=thresholds[1],
    )  # fmt: skip
    return found


@pytest.mark.parametrize("bs, width", SIZES)
@pytest.mark.parametrize("vocab", [2, 7, 64])
def test_sample_chain_is_rejection_sampling_of_sure_drafts(bs, width, vocab):
    """SGLang's other sampler divides by what the draft model gave a draft: 1 for one it is sure of.

    Both then accept with the target's own probability, and draw from the same rest. (The sampler
    whose place ours takes is CUDA C++.)
    """
    for seed in range(5):
        probs, drafts, coins, last_coins = distributions(bs, width, vocab, seed)
        # The probability of what follows a node, given by the draft model: the next node's token.
        sure = torch.nn.functional.one_hot(drafts.roll(-1, 1), vocab).float()
        expected, found = outputs(bs, width), outputs(bs, width)
        index = torch.arange(bs * width).view(bs, width)
        chain_speculative_sampling_triton(
            *expected, drafts, index, None, None, coins, last_coins, probs, sure, 1.0, 1.0, True
        )
        sample(found, probs, drafts, coins, last_coins)
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other)


def test_each_sampled_token_has_the_targets_distribution():
    """Over a grid of all coins: exact to the width of the grid, and no chance in it."""
    probs = torch.tensor([[0.5, 0.3, 0.2, 0.0], [0.0, 0.6, 0.1, 0.3], [0.25, 0.25, 0.0, 0.5]])
    steps = 20
    grid = (torch.arange(steps) + 0.5) / steps
    for drafts in itertools.product(range(4), repeat=2):
        coins = torch.cartesian_prod(grid, grid, grid)
        n = len(coins)
        nodes = torch.tensor([3, *drafts]).repeat(n, 1)
        uniform = torch.cat([coins[:, :2], torch.zeros(n, 1)], 1)
        predicts, index, accepted = sample(
            outputs(n, 3), probs.repeat(n, 1, 1), nodes, uniform, coins[:, 2]
        )
        tokens = predicts.view(n, 3)
        assert torch.equal(tokens != POISON, index != POISON)
        for node in range(3):
            reached = accepted >= node
            share = torch.bincount(tokens[reached, node], minlength=4) / max(1, reached.sum())
            if reached.any():
                torch.testing.assert_close(share, probs[node], atol=1.5 / steps, rtol=0)
                assert (share[probs[node] == 0] == 0).all()


def one_step(p, coin, last_coin=0.5, draft=0, thresholds=(1.0, 1.0)):
    """(drafts accepted, the last token) of one draft over probabilities p."""
    probs = torch.tensor([[p, p]])
    coins = torch.tensor([[coin, 0.0]])
    found = sample(
        outputs(1, 2), probs, torch.tensor([[0, draft]]), coins, torch.tensor([last_coin]),
        thresholds,
    )  # fmt: skip
    accepted = int(found[2])
    return accepted, int(found[0][accepted])


def test_edges_of_the_sampler():
    below_one = 1 - 2**-24
    assert one_step([0.0, 1.0], 0.0) == (0, 1)  # a coin of 0 is below no probability of 0
    assert one_step([1.0, 0.0], below_one) == (1, 0)
    assert one_step([0.5, 0.5], 0.5) == (0, 1)  # p or more: rejected
    assert one_step([0.5, 0.5, 0.0], 0.1, below_one) == (1, 1)  # no token of probability 0 last
    assert one_step([0.5, 0.5], 0.9, thresholds=(0.5, 1.0))[0] == 1
    assert one_step([0.5, 0.5], 0.9, thresholds=(0.6, 1.0))[0] == 0
    assert one_step([0.5, 0.5], 0.9, thresholds=(1.0, 0.5))[0] == 1
    assert one_step([0.0, 1.0], 0.9, thresholds=(0.0, 0.5)) == (0, 1)
    assert one_step([0.5, 0.0], 0.9) == (0, 1)  # nothing is left: the last, as the kernel has it


def test_an_empty_batch():
    none = torch.zeros(0, 3, dtype=torch.long)
    found = sample(outputs(0, 3), torch.zeros(0, 3, 5), none, torch.zeros(0, 3), torch.zeros(0))
    assert [len(one) for one in found] == [0, 0, 0]
    names = ("predicts", "accept_index", "accept_token_num")
    speculation.verify_chain(
        **dict(zip(names, outputs(0, 3), strict=True)), candidates=none, target_predict=none
    )
    assert speculation.slots_after(torch.zeros(4, 8), none[:, 0], none[:, 0], 3).shape == (0,)


@pytest.mark.parametrize("vocab", [5, 100])
def test_top_k_and_top_p(monkeypatch, vocab):
    """Against the Triton kernels that SGLang has for ROCm; they ask for a device by name."""
    monkeypatch.setattr(renorm_triton, "_prepare_probs", lambda probs: probs)
    g = random(vocab)
    probs = torch.randint(0, 9, (12, vocab), generator=g).float()  # many are equal
    probs[:, 1] += 1
    probs /= probs.sum(1, keepdim=True)
    top_ks = torch.randint(1, vocab + 1, (12,), generator=g)
    top_ks[0] = 1 << 30  # SGLang's number for all
    top_ps = torch.rand(12, generator=g)
    top_ps[:2] = torch.tensor([1.0, 1e-6])
    for ours, theirs, limits in (
        (speculation.top_k_renorm, renorm_triton.top_k_renorm_probs_triton, top_ks),
        (speculation.top_p_renorm, renorm_triton.top_p_renorm_probs_triton, top_ps),
    ):
        found, expected = ours(probs, limits), theirs(probs, limits)
        assert torch.equal(found > 0, expected > 0)
        torch.testing.assert_close(found, expected, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("bs, width", SIZES)
def test_fill_bonus_tokens(bs, width):
    g = random(width)
    tokens = torch.randint(0, 1000, (bs * width,), generator=g).int()
    lens = torch.randint(1, width + 1, (bs,), generator=g).int()
    expected, found = (torch.full((bs,), POISON, dtype=torch.int32) for _ in range(2))
    eagle.fill_bonus_tokens[(bs,)](tokens, lens, expected, width)
    speculation.fill_bonus_tokens(tokens, lens, found, width, bs)
    assert torch.equal(found, expected)


def request_table(bs, seed, rows=9, length=64):
    """(table, its rows of bs requests, their lengths)"""
    g = random(seed)
    table = torch.randint(1, 5000, (rows, length), generator=g).int()
    return table, torch.randperm(rows, generator=g)[:bs], torch.randint(0, 40, (bs,), generator=g)


@pytest.mark.parametrize("bs, width", SIZES)
def test_slots_of_drafts_and_of_a_verify_step(bs, width):
    table, rows, lens = request_table(bs, width)
    expected, found = (torch.full((bs * width,), POISON) for _ in range(2))
    positions, ours = (torch.full((bs,), POISON) for _ in range(2))
    cache_locs.assign_draft_cache_locs_contiguous[(bs,)](
        rows, table, lens, expected, table.shape[1], 1, width, positions=positions,
        WRITE_POSITIONS=True,
    )  # fmt: skip
    speculation.draft_slots(rows, table, lens, found, 1, width, positions=ours)
    assert torch.equal(found, expected) and torch.equal(ours, positions)
    expected = torch.full((bs * width,), POISON)
    cache_locs.assign_extend_cache_locs[(bs,)](
        rows, table, lens, lens + width, expected, table.shape[1], next_power_of_2(bs)
    )
    found = speculation.verify_slots(rows, table, lens, lens + width, bs, width, "cpu")
    assert torch.equal(found, expected) and found.dtype == expected.dtype


@pytest.mark.parametrize("bs", range(1, 7))
def test_note_slots(bs):
    table, rows, starts = request_table(bs, bs)
    ends = starts + torch.randint(0, 9, (bs,), generator=random(bs))
    slots = torch.randint(1, 5000, (int((ends - starts).sum()) + 3,), generator=random(bs))
    expected, found = table.clone(), table.clone()
    allocation.assign_req_to_token_pool[(bs,)](
        rows, expected, starts, ends, slots, table.shape[1], next_power_of_2(bs)
    )
    speculation.note_slots(rows, found, starts, ends, slots, bs)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("bs", range(1, 7))
def test_last_slots(bs):
    table, rows, lens = request_table(bs, bs)
    lens[0] = 0  # a request without any has none
    assert torch.equal(
        speculation.last_slots(table, rows, lens), get_last_loc_triton(table, rows, lens)
    )

"""`python -m sglang_ess.testing.train`: train the recall model from nothing, on a CPU.

Two cores need about 45 minutes. Each step draws its documents from the seed and its own number, so
a run that is stopped goes on where it was, with the same numbers. The plan: short documents until
the model can copy, longer ones, long ones in which each query reads its top-k only, as when
served; then the MTP layer alone.
"""

import argparse
import json
import math
import os
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sglang_ess.testing import recall
from sglang_ess.testing.recall import documents, measure
from sglang_ess.testing.recall.network import Network, Selection
from sglang_ess.testing.tiny_tokenizer import TOKEN_IDS, VOCAB_SIZE
from sglang_ess.testing.tiny_weights import write_weights

LAST_RATE_SHARE, WARM_UP = 0.03, 100  # of a cycle's learning rate; steps in which it grows
INDEXER_RATE_SHARE = 2.0
DECAY, BETAS, CLIP = 0.05, (0.9, 0.95), 1.0
SAMPLED = 48  # queries a sequence whose selections the indexers learn
REPORT_STEPS, MEASURE_STEPS, SAVE_STEPS = 20, 200, 100
MEASURED_LENGTH, MEASURED_DOCUMENTS = 1024, 4


@dataclass(frozen=True)
class Stage:
    """steps of `batch` sequences of `length` tokens; sparse: queries read their top-k only
    cycle: stages of one cycle share a learning rate that rises to the cycle's and falls
    """

    steps: int
    length: int
    batch: int
    cycle: str = "copy"
    sparse: bool = False

    @property
    def drafts(self) -> bool:
        """Whether the MTP layer learns, and nothing else."""
        return self.cycle == "draft"


RATES = {"copy": 2e-3, "longer": 1e-3, "draft": 2e-3}
STAGES = (
    Stage(350, 512, 8),
    Stage(550, 1024, 4),
    Stage(250, 1024, 4, "longer"),
    Stage(150, 4096, 1, "longer"),
    Stage(30, 4096, 1, "longer", sparse=True),
    Stage(250, 1024, 4, "draft"),
)


def planned(share: float) -> list[Stage]:
    """One stage for each step, the plan's steps times `share`."""
    return [stage for stage in STAGES for _ in range(max(1, round(stage.steps * share)))]


def _rate(stages: list[Stage], number: int) -> float:
    """The learning rate of a step: a cosine over the steps of its cycle."""
    cycle = stages[number].cycle
    same = [i for i, stage in enumerate(stages) if stage.cycle == cycle]
    done = (number - same[0]) / len(same)
    cosine = 0.5 * (1 + math.cos(math.pi * done))
    warm = min(1.0, (number - same[0] + 1) / min(WARM_UP, len(same)))
    return RATES[cycle] * warm * (LAST_RATE_SHARE + (1 - LAST_RATE_SHARE) * cosine)


def _batch(seed: int, number: int, stage: Stage) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, weights and positions, [batch, length + 1], of a step."""
    rng = random.Random(f"{seed}/{number}")
    span, pad = recall.SHAPE.context, TOKEN_IDS["pad_token_id"]
    samples = [documents.sample(rng, stage.length + 1, span, pad) for _ in range(stage.batch)]
    ids, weights, positions = (np.stack(part) for part in zip(*samples, strict=True))
    return torch.from_numpy(ids), torch.from_numpy(weights), torch.from_numpy(positions)


class Training:
    """A network, its optimisers and the number of steps done."""

    def __init__(self, seed: int, share: float):
        torch.manual_seed(seed)
        self.seed, self.share, self.done = seed, share, 0
        self.stages = planned(share)
        self.network = Network(recall.SHAPE, VOCAB_SIZE)
        groups: dict[tuple[bool, bool], list] = {}
        for name, parameter in self.network.named_parameters():
            kind = (name.startswith("draft."), ".indexer." in name)
            groups.setdefault(kind, []).append(parameter)
        self.optimisers = {
            drafts: torch.optim.AdamW(
                [
                    {"params": groups[drafts, indexer], "share": share}
                    for indexer, share in ((False, 1.0), (True, INDEXER_RATE_SHARE))
                ],
                betas=BETAS,
                weight_decay=DECAY,
            )
            for drafts in (False, True)
        }

    def step(self) -> dict[str, Any]:
        """Do one step. Returns its losses, in nats, and the share of answer bytes it got right."""
        stage = self.stages[self.done]
        ids, weights, positions = _batch(self.seed, self.done, stage)
        optimiser = self.optimisers[stage.drafts]
        for group in optimiser.param_groups:
            group["lr"] = _rate(self.stages, self.done) * group["share"]
        optimiser.zero_grad()
        logits, wanted, weights, losses = self._forward(stage, ids, weights, positions)
        each = F.cross_entropy(logits, wanted, reduction="none")
        loss = (each * weights).sum() / weights.sum() + torch.stack(losses).sum()
        loss.backward()
        for group in optimiser.param_groups:  # the indexers' are apart: their loss is another
            torch.nn.utils.clip_grad_norm_(group["params"], CLIP)
        optimiser.step()
        self.done += 1
        answer = weights == 1
        return {
            "step": self.done,
            **asdict(stage),
            "answers": each[answer].mean().item(),
            "text": each[(weights > 0) & ~answer].mean().item(),
            "right": (logits.argmax(-1) == wanted)[answer].float().mean().item(),
            "indexers": [round(one.item(), 4) for one in losses],
        }

    def _forward(self, stage, ids, weights, positions):
        """Logits, tokens wanted and their weights, flat; the indexers' losses."""
        torch.manual_seed(self.done)
        network = self.network
        inputs, ahead = ids[:, :-1], 1 + stage.drafts
        sampled = torch.multinomial(weights[:, 1:-1] + 0.02, SAMPLED).sort(-1).values
        options = {"sampled": sampled, "losses": [], "selection": None}
        if stage.sparse:
            options["selection"] = Selection(recall.SHAPE.index_topk)
        with torch.autocast("cpu", torch.bfloat16):
            if stage.drafts:
                with torch.no_grad():
                    hidden = network.hidden(inputs, network.step(positions[:, :-1]))
                step = network.step(positions[:, :-2], **options)
                hidden = network.drafts(inputs, hidden, step)
            else:
                step = network.step(positions[:, :-1], **options)
                hidden = network.hidden(inputs, step)
            logits = network.lm_head(hidden).float()
        wanted, weights = ids[:, ahead:].flatten(), weights[:, ahead:].flatten()
        return logits.flatten(0, 1), wanted, weights, step.losses

    def measured(self) -> dict[str, float]:
        """Recall of each kind, with the top-k."""
        selection = Selection(recall.SHAPE.index_topk)
        found = measure.answers(self.network, MEASURED_LENGTH, MEASURED_DOCUMENTS, selection)
        return {kind: measure.recall(found, kind) for kind in documents.KINDS}

    def save(self, path: Path) -> None:
        """Write all that `load` needs; a run that is killed meanwhile finds the file before."""
        state = {
            "recipe": (self.seed, self.share),
            "done": self.done,
            "network": self.network.state_dict(),
            "optimisers": {d: one.state_dict() for d, one in self.optimisers.items()},
        }
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, path)

    def load(self, path: Path) -> None:
        """Raises: ValueError if the file is of another run."""
        state = torch.load(path, weights_only=True)
        if tuple(state["recipe"]) != (self.seed, self.share):
            raise ValueError(
                f"--seed and --share must be {state['recipe']}, as {path} has them: got "
                f"{(self.seed, self.share)}. Say another --out, or remove the file."
            )
        self.done = state["done"]
        self.network.load_state_dict(state["network"])
        for drafts, one in self.optimisers.items():
            one.load_state_dict(state["optimisers"][drafts])


def train(training: Training, out: Path) -> Iterator[dict[str, Any]]:
    """Do the steps that are left. Yields a line for the log now and then."""
    since, of_this_run = time.monotonic(), training.done
    while training.done < len(training.stages):
        line = training.step()
        last = training.done == len(training.stages)
        if training.done % MEASURE_STEPS == 0 or last:
            line["recall"] = training.measured()
        if training.done % SAVE_STEPS == 0 or last:
            training.save(out / "training.pt")
        if training.done % REPORT_STEPS == 0 or last:
            line["seconds_a_step"] = (time.monotonic() - since) / (training.done - of_this_run)
            yield line


def plot(log: list[dict], path: Path) -> None:
    """Draw losses and recall over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (losses, right) = plt.subplots(2, 1, sharex=True, figsize=(8, 6))
    steps = [line["step"] for line in log]
    for name in ("answers", "text"):
        losses.plot(steps, [line[name] for line in log], label=f"{name}, nats a byte")
    losses.plot(steps, [np.mean(line["indexers"]) for line in log], label="indexers, nats")
    losses.set_yscale("log")
    right.plot(steps, [line["right"] for line in log], label="answer bytes")
    measured = [line for line in log if "recall" in line]
    for kind in documents.KINDS:
        points = [line["recall"][kind] for line in measured]
        right.plot([line["step"] for line in measured], points, marker="o", label=f"{kind}, whole")
    right.set_xlabel("step")
    right.set_ylabel("share right")
    for axes in (losses, right):
        axes.legend()
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def write_tensors(network: Network, path: Path) -> None:
    """Write a checkpoint's tensors, bfloat16."""
    named = ((n, t.float().numpy()) for n, t in network.named_tensors().items())
    write_weights(path, named, "bfloat16")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m sglang_ess.testing.train", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="directory; a run in it goes on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--share", type=float, default=1.0, help="of the plan's steps [1.0]")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    log_file, state = out / "log.jsonl", out / "training.pt"
    training = Training(options.seed, options.share)
    log = []
    if state.is_file():
        try:
            training.load(state)
        except ValueError as error:
            parser.error(str(error))
        lines = log_file.read_text().splitlines() if log_file.is_file() else []
        log = [line for line in map(json.loads, lines) if line["step"] <= training.done]
    from tqdm import tqdm

    bar = tqdm(total=len(training.stages), initial=training.done, unit="step")
    with bar, open(log_file, "w") as written:
        for line in log:
            print(json.dumps(line), file=written)
        for line in train(training, out):
            log.append(line)
            print(json.dumps(line), file=written, flush=True)
            bar.set_postfix_str(f"right {line['right']:.3f}, length {line['length']}")
            bar.update(line["step"] - bar.n)
    write_tensors(training.network, out / "model.safetensors")
    plot(log, out / "training.png")
    print(f"wrote {out / 'model.safetensors'}, training.png, log.jsonl; recall {log[-1]['recall']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

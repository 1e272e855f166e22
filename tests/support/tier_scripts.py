"""Lives of an engine, and how far two engines differ that have lived the same one.

Every engine of a comparison runs the same script of requests, admitted in the same batches
(tests/support/gather.py), with the same number of slots: only the place of the rows differs.
"""

import numpy as np

from tests.support import parity
from tests.support.engine import EngineProcess

GATHER = "tests.support.gather:install"
EXPOSE = "tests.support.tiers:expose"
FAULT = "tests.support.two_tier_faults:"
SLOTS = 16384
SAMPLES = "samples"
MIN_ROWS = 64  # capacity.MIN_HOT_ROWS
RATIOS = {"all": 1.0, "quarter": 0.25, "tenth": 0.1, "minimum": MIN_ROWS / SLOTS}


def engine(model, ratio=None, faults=(), ess=None, patches=(), **server_args):
    """One-tier without a ratio. float32, so that a wrong row cannot hide in rounding."""
    tiers = {"enabled": False} if ratio is None else {"hot_ratio": ratio, "canary_rate": 1.0}
    tiers |= {"admission": "off"}  # the same batches as one-tier, and so the same rounding
    return EngineProcess(
        model,
        ess={"index_dtype": "float32"} | tiers | (ess or {}),
        patches=[
            GATHER,
            *([EXPOSE] if ratio else []),
            *(FAULT + fault for fault in faults),
            *patches,
        ],
        **{"dtype": "float32", "max_total_tokens": SLOTS, "chunked_prefill_size": 512}
        | server_args,
    )


def script(served) -> dict[str, list]:
    """Outputs of a life of an engine: cold, shared prefixes, samples, aborts, reused slots."""
    lengths = [20, 33, 400, 1500, 640]  # below top-k, past it, several chunks
    prompts = parity.prompts_of(lengths)
    outputs = {"cold": served.together("cold", prompts, 16, start=0)}
    follow_ups = [prompt + tail for prompt in prompts[2:] for tail in ([1, 2, 3], [4] * 70)]
    outputs["shared"] = served.together("shared", follow_ups, 16)
    outputs[SAMPLES] = served.together("samples", [prompts[3]], 16, n=3)
    served.abort(parity.prompts_of([3000, 900], seed=2), 0.15, 500)  # in prefill, or soon after
    served.abort(parity.prompts_of([300, 90], seed=3), 0.5, 4000)  # in decode
    outputs["after aborts"] = served.together("after aborts", prompts[1:4], 16)
    served.flush()
    # Others' slots now, and their hot rows: SGLang hands out freed pages again.
    outputs["reused"] = served.together("reused", parity.prompts_of(lengths, 4), 16, start=0)
    outputs["again"] = served.together("again", parity.prompts_of([2500, 700], 5), 16)
    return outputs


def long_script(served) -> dict[str, list]:
    """One request of 8K tokens among short ones, then a prefix hit of 8K."""
    long, short = parity.prompts_of([8000, 100], seed=6)
    outputs = {"long": served.together("long", [long, short, short[:50]], 16)}
    return outputs | {"hit": served.together("hit", [long + short, short], 16)}


_baselines: dict = {}


def baseline(model, run, **server_args) -> dict[str, list]:
    """The one-tier server's outputs of a script; each is computed once.

    server_args: EngineProcess's
    """
    key = (model, run, tuple(sorted(server_args.items())))
    if key not in _baselines:
        with engine(model, **server_args) as served:
            _baselines[key] = run(served)
    return _baselines[key]


def differences(outputs, expected) -> list[float]:
    """Largest difference in logprobs of each request, prompt and output; inf: other tokens."""
    found = []
    for name in expected:
        for one, other in zip(outputs[name], expected[name], strict=True):
            if one.token_ids != other.token_ids:
                found.append(np.inf)
                continue
            pairs = [(one.logprobs, other.logprobs), (one.prompt_logprobs, other.prompt_logprobs)]
            difference = max(np.abs(a - b).max(initial=0) for a, b in pairs)
            # Samples get rids of SGLang's own, so their batches are not gathered.
            found.append(difference if name != SAMPLES or difference > 1e-5 else 0.0)
    return found


def all_same(outputs, expected) -> bool:
    return max(differences(outputs, expected)) == 0.0

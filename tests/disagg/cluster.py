"""The flags of prefill and decode nodes in tests, and the cluster of test_pd_serving."""

from pathlib import Path

from sglang_ess.testing.tiny_model import TinyModelConfig, write_tiny_model
from tests.support.pd import PdCluster

# float32 in the model, the rows and the index keys, so that a wrong row cannot hide in rounding.
SERVER_FLAGS = (
    *("--dtype", "float32", "--ess-index-dtype", "float32", "--random-seed", "1"),
    *("--context-length", "8192", "--chunked-prefill-size", "512", "--enable-cache-report"),
)
SLOTS = 4096
DECODE_FLAGS = (
    *("--ess-hot-ratio", "0.3", "--disaggregation-decode-enable-radix-cache"),
    # Few enough that all of test_concurrent_requests run together; metrics of each step.
    *("--num-reserved-decode-tokens", "64", "--decode-log-interval", "1"),
)
# Index groups of one layer and of three: warm-up ids, metrics and hot rows are by group.
SHARING, FIRST_LAYERS = "FFSS", ["0", "1"]


def write_model(directory: Path) -> Path:
    shape = TinyModelConfig(
        arch="glm", index_topk=32, heads=4, layers=len(SHARING), sharing=SHARING
    )
    return write_tiny_model(directory / "glm", shape)


def start(model: Path, directory: Path, prefill_flags=(), decode_flags=(), **more) -> PdCluster:
    """A cluster that is starting. more: further arguments of PdCluster"""
    flags = (*SERVER_FLAGS, "--max-total-tokens", str(SLOTS), "--enable-metrics")
    return PdCluster(
        model,
        directory,
        flags,
        prefill_flags=prefill_flags,
        decode_flags=(*DECODE_FLAGS, *decode_flags),
        **more,
    )

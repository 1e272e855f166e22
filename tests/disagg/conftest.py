"""What the tests of prefill-decode disaggregation share: a model, and what it must answer."""

import pytest

from tests.support import parity
from tests.support.engine import EngineProcess

# float32 in the model, the rows and the index keys, so that a wrong row cannot hide in rounding.
SERVER_FLAGS = (
    *("--dtype", "float32", "--ess-index-dtype", "float32", "--random-seed", "1"),
    *("--context-length", "8192", "--chunked-prefill-size", "512", "--enable-cache-report"),
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    shape = dict(arch="v32", index_topk=32, heads=4, layers=3)
    return parity.write_model(tmp_path_factory.mktemp("model") / "v32", **shape)


@pytest.fixture(scope="module")
def colocated(model):
    """One server's worth of SGLang, one-tier, without the HTTP: what every answer must equal."""
    args = dict(dtype="float32", chunked_prefill_size=512, context_length=8192)
    ess = {"index_dtype": "float32", "enabled": False}
    with EngineProcess(model, ess=ess, **args) as engine:
        yield engine

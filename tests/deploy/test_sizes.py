"""deploy/sizes.py against arithmetic by hand, and the figures of docs/deployment.md against it."""

import pytest

from deploy import sizes
from sglang_ess.layout import GIB
from tests.deploy import manifests, rules
from tests.docs import pages

PAGE = pages.REPO / "docs" / "deployment.md"


@pytest.mark.parametrize(
    ("name", "rows", "tensor", "slot_bytes", "tiers"),
    [
        ("deepseek-v3.2", "fp8", 8, 61 * 656, 1),
        ("deepseek-v3.2", "bf16", 1, 61 * 1152, 8),
        ("glm-5.2", "fp8", 1, 78 * 656, 8),
        ("glm-5.2", "bf16", 8, 78 * 1152, 1),
    ],
)
def test_host_memory_by_hand(name, rows, tensor, slot_bytes, tiers):
    found = sizes.sizes(name, rows, tensor)
    assert found.tier_bytes == (found.slots + 64) * slot_bytes
    assert found.node_bytes == tiers * found.tier_bytes
    # A page more does not fit on the device, and index keys alone account for its bytes.
    geometry, more = found.geometry, found.slots + 64
    assert geometry.device_bytes(found.slots, found.hot_rows) <= found.kv_bytes
    assert geometry.device_bytes(more, round(sizes.HOT_RATIO * more)) > found.kv_bytes
    groups = {61: 61, 78: 21}[geometry.layers]
    assert geometry.slot_device_bytes == groups * 132 + (groups + 1) * 4
    hot = found.hot_rows * (slot_bytes + groups * 8)
    staging = 2 * (found.model.max_context + 64) * geometry.row_bytes
    rest = found.kv_bytes - (found.slots + 64) * geometry.slot_device_bytes - hot - staging
    assert 0 <= rest < 0.3 * GIB


def test_requests():
    found = sizes.sizes("glm-5.2", "fp8", 1)._replace(slots=1_000_000)
    assert found.requests(32_768) == 8 * 30
    assert found.requests(131_072 + 1) == 8 * (1_000_000 // (131_072 + 64))
    assert found.requests(1_048_576) == 0 and found.requests(1_048_577) is None


def test_the_pages_figures():
    """The table is generated; these stand in its text."""
    text = " ".join(PAGE.read_text().split())
    tp8 = sizes.sizes("glm-5.2", "fp8", 8)
    named = [
        f"{tp8.one_tier // 1000},000 tokens of GLM-5.2",
        f"{sizes.weights_gib('deepseek-v3.2'):.0f} GiB in V3.2",
        f"{sizes.weights_gib('glm-5.2'):.0f} in GLM-5.2",
        f"{sizes.SHM_GIB} GiB for `/dev/shm`, some {sizes.PROCESS_GIB} GiB a rank",
        f"waits {rules.health_seconds()} s for it",
        f"then {rules.END_SECONDS:g} s pass",
    ]
    for pod in manifests.pods(manifests.everything()):
        if pod.owner in ("glm", "glm-decode"):
            memory = manifests.quantity(pod.container["resources"]["limits"]["memory"])
            limit = pod.spec["terminationGracePeriodSeconds"]
            named.append(f"`preStop` waits {rules.delay_of(pod):g} s")
            named += [f"{memory // GIB:,} GiB", f"`terminationGracePeriodSeconds` ({limit})"]
    assert [one for one in named if one not in text] == []
    assert len(PAGE.read_text().splitlines()) <= 120
    assert "validated offline and never run" in text

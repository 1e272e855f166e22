"""benchmarks/serving/host_tier: what it counts was touched, and its summary is of its rows."""

import json
import mmap

import pytest

from benchmarks.serving import host_tier

MIB = 1 << 20


def test_the_command(tmp_path, capsys):
    paths = tmp_path / "out.json", tmp_path / "out.png"
    host_tier.main(["--quick", "--gib", "0.0625", "--json", str(paths[0]), "--plot", str(paths[1])])
    data = json.loads(paths[0].read_text())
    rows = {(row["name"], row["metric"]): row for row in data["rows"]}
    assert {name for name, metric in rows if metric == "touch"} == set(host_tier.SYSTEMS)
    assert all(row["kind"] == "measured" and row["n"] == 3 for row in rows.values())
    assert all(row["config"]["gib"] == 0.0625 for row in rows.values())
    summary = data["summary"]
    for name in host_tier.SYSTEMS:
        for metric in ("touch", "cpu"):
            figure = summary[f"{metric}_gib_s_{name.replace(' ', '_')}"]
            assert figure == rows[name, metric]["median"] > 0
    assert summary["speedup"] == rows["after / before", "speedup"]["median"]
    assert 0 <= summary["huge_share"] <= 1
    assert paths[1].read_bytes().startswith(b"\x89PNG")
    assert "after" in capsys.readouterr().out


def test_memory_that_nobody_touched_does_not_count():
    def untouched(num_bytes):
        return mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)

    with pytest.raises(RuntimeError, match=f"must grow by {64 * MIB} bytes"):
        host_tier.sample(untouched, 64 * MIB)


def test_small_pages_are_small_and_huge_ones_only_where_they_are_asked_for():
    rate, cpu_rate, share = host_tier.sample(host_tier.small_pages, 64 * MIB)
    assert rate > 0 and cpu_rate > 0 and share is None
    *_, share = host_tier.sample(host_tier.host_memory, 64 * MIB)
    assert 0 <= share <= 1

"""benchmarks/store: every system reads what it wrote, and the summary is of its rows."""

import json
import os

import numpy as np
import pytest

from benchmarks import harness, store


@pytest.fixture
def small(monkeypatch):
    """Objects of 10 KB: the command's path, not its figures."""
    parts = [4000, 5000, 1000]
    monkeypatch.setattr(store, "PARTS", parts)
    monkeypatch.setattr(store, "BYTES", sum(parts))
    monkeypatch.setattr(store, "DIRECT_BYTES", 12288)


def test_the_command(small, tmp_path, capsys):
    paths = tmp_path / "out.json", tmp_path / "out.png"
    options = ["--quick", "--objects", "100", "--directory", str(tmp_path)]
    store.main([*options, "--json", str(paths[0]), "--plot", str(paths[1])])
    data = json.loads(paths[0].read_text())
    rows = [row for row in data["rows"] if row["metric"] == "gb_s"]
    assert {(row["name"], row["move"]) for row in rows} == {
        (name, move) for name in store.SYSTEMS for move in store.MOVES
    }
    for row in rows:
        assert row["kind"] == "measured" and row["n"] == 3 and row["median"] > 0
        assert data["summary"][f"gb_s_{row['move']}_{row['name']}"] == row["median"]
    assert data["summary"]["evicted"] >= 2
    assert data["summary"]["contains_us"] > 0 and data["summary"]["open_seconds"] > 0
    assert paths[1].read_bytes().startswith(b"\x89PNG")
    assert "store" in capsys.readouterr().out
    assert sorted(os.listdir(tmp_path)) == ["out.json", "out.png"]


def test_a_system_that_reads_other_bytes_has_no_figure(small, tmp_path, monkeypatch):
    class Wrong(store.Plain):
        def read(self, i):
            self.pages[i][:] = 1

    monkeypatch.setitem(store.SYSTEMS, "plain", Wrong)
    pages = np.full((2, store.BYTES), 7, np.uint8)
    with pytest.raises(RuntimeError, match="plain must read what it wrote"):
        store.measure(harness.Report(), tmp_path, pages, threads=1, rounds=1)

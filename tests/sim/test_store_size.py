"""How large a store must be for some prompts: as the store itself counts its files."""

import json

import pytest

from sglang_ess.sim.cli import plan
from sglang_ess.sim.inputs.specs import load
from sglang_ess.sim.planning.store_size import stored_bytes
from sglang_ess.store.page_store import PageStore

PAGE = 64


@pytest.mark.parametrize("drafts", [False, True])
def test_a_store_charges_as_much(tmp_path, drafts):
    model = load("model", "glm-5.2")
    parts = [model.row_bytes * PAGE] * (model.layers + drafts * model.mtp_layers)
    parts += [model.index_bytes * PAGE] * (len(model.groups) + drafts * model.mtp_layers)
    store = PageStore(tmp_path / "store", 1 << 30, "one", parts)
    before = store.stats().used_bytes
    for key in ("a", "b"):
        assert store.write(key, [bytes(size) for size in parts])
    assert store.stats().used_bytes - before == stored_bytes(model, 2 * PAGE, drafts)
    store.close()


def test_little_is_added_to_rows_and_keys():
    model = load("model", "glm-5.2")
    floor = 131072 * (model.all_row_bytes + model.all_index_bytes)
    assert floor < stored_bytes(model, 131072, False) < 1.005 * floor


def test_only_whole_pages_are_kept():
    model = load("model", "deepseek-v3.2")
    assert stored_bytes(model, PAGE - 1, True) == 0
    assert stored_bytes(model, 2 * PAGE + 1, True) == stored_bytes(model, 2 * PAGE, True)


def test_plan_says_how_large(tmp_path, capsys):
    flags = "--model glm-5.2 --gpu h200 --input 16384 --output 64 --itl-ms 60 --mtp 1 --requests 2"
    asked = [*flags.split(), "--documents", "1000", "--json", str(tmp_path / "plan.json")]
    plan.main(asked)
    expected = 1000 * stored_bytes(load("model", "glm-5.2"), 16384, False)
    assert json.loads((tmp_path / "plan.json").read_text())["store_bytes"] == expected
    assert f"--ess-store PATH:{-(-expected // 2**30)}GiB keeps 1,000" in capsys.readouterr().out

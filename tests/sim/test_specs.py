"""The spec files that come with ESS load, and a bad file is refused with its line and field."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import pytest

import sglang_ess.sim.inputs.specs as specs
from sglang_ess.sim.inputs.files import (
    FRACTION,
    POSITIVE,
    Checked,
    SpecError,
    find,
    names,
    read,
    spec,
)

FILES = [(kind, name) for kind, (folder, _) in specs.KINDS.items() for name in names(folder)]


@pytest.mark.parametrize(("kind", "name"), FILES)
def test_every_file_loads_and_says_where_each_number_is_from(kind, name):
    folder, cls = specs.KINDS[kind]
    assert isinstance(specs.load(kind, name), cls)
    for line in find(folder, name).read_text().splitlines():
        if "=" in line.partition("#")[0] and not line.startswith("calibration"):
            assert re.search(r"# \w", line), line


def test_the_files_that_users_are_told_of_are_there():
    assert {"deepseek-v3.2", "glm-5", "glm-5.2", "hy4"} <= set(names("models"))
    assert {"h100", "h200", "b200", "a100-40gb", "a100-80gb"} <= set(names("gpus"))
    assert {"pcie4", "pcie5", "nvlink-c2c"} <= set(names("links"))
    assert {"ess-paper-32k", "ess-paper-128k", "node-8"} <= set(names("deployments"))


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        ("deepseek-v3.2", 671e9, 37e9),
        ("glm-5", 744e9, 40e9),
        ("glm-5.2", 744e9, 40e9),
        ("hy4", 770e9, 49e9),
    ],
)
def test_weights_add_up_to_the_published_parameters(name, total, active):
    """671B, 37B active: DeepSeek-V3's report. 744B, 40B: GLM-5's README. 770B, 49B: Hy4's."""
    model = specs.load("model", name)
    moe = model.layers - model.dense_layers
    rest = model.layers * model.projection_weights + len(model.groups) * model.indexer_weights
    rest += model.dense_layers * model.dense_weights + 2 * model.vocabulary * model.hidden

    def weights(experts):
        return rest + moe * (experts + model.shared_experts) * model.expert_weights

    assert weights(model.experts) == pytest.approx(total, rel=0.01)
    assert weights(model.experts_per_token) == pytest.approx(active, rel=0.07)


def test_layers_select_where_transformers_says():
    """By GLM-5.2's index_topk_freq and index_skip_topk_offset; by Hy4's rule for any depth."""
    from transformers import GlmMoeDsaConfig
    from transformers.models.hy_v4.configuration_hy_v4 import HYV4Config

    glm = GlmMoeDsaConfig(index_topk_freq=4, index_skip_topk_offset=3)
    for name, config in (("glm-5.2", glm), ("hy4", HYV4Config(num_hidden_layers=78))):
        firsts = [i for i, kind in enumerate(config.indexer_types) if kind == "full"]
        assert firsts == list(specs.load("model", name).groups.firsts)
    # What ROCm/ATOM 1260 says of GLM-5.2's checkpoint.
    assert specs.load("model", "glm-5.2").groups.firsts == (0, 1, 2, *range(6, 75, 4))


def test_layers_that_share_have_no_index_keys():
    model = specs.load("model", "glm-5.2")
    assert (model.all_row_bytes, model.all_index_bytes) == (51168, 2772)
    assert model.all_row_bytes + model.all_index_bytes == 53940  # as vLLM measured: recipes 893
    each = specs.load("model", "glm-5")
    assert (each.all_row_bytes, each.all_index_bytes) == (51168, 10296)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ("[1, 4]", "is refused: index_groups must add up to layers: got 5, layers 78."),
        ("[0, 78]", "index_groups must be 1 or more: got (0, 78)."),
        ("[]", "is refused: index_groups must add up to layers: got 0, layers 78."),
        ("4", "index_groups must be a list: got 4."),
        ("[1.5]", "index_groups[0] must be a whole number: got 1.5."),
    ],
)
def test_bad_index_groups_are_one_line(tmp_path, groups, message):
    path = tmp_path / "model.toml"
    text = find("models", "glm-5.2").read_text()
    path.write_text(re.sub(r"index_groups = .*", f"index_groups = {groups}", text))
    with pytest.raises(SpecError) as error:
        specs.load("model", path)
    assert message in str(error.value) and "\n" not in str(error.value)


@dataclass(frozen=True)
class Part(Checked):
    rate: float = spec(POSITIVE)
    share: float = spec(FRACTION, default=0.5)


@dataclass(frozen=True)
class Whole(Checked):
    name: str = spec(choices=("a", "b"))
    count: int = spec(POSITIVE)
    part: Part = spec()
    parts: tuple[Part, ...] = spec(default=())
    sizes: tuple[float, ...] = spec(POSITIVE, default=())
    limit: float | None = spec(POSITIVE, default=None)
    on: bool = spec(default=True)

    def __post_init__(self):
        super().__post_init__()
        if self.count > 100:
            raise ValueError(f"count must be at most 100: got {self.count}.")


GOOD = """\
name = "a"  # a comment = not a key
count = 3
sizes = [1, 2.5]
part = { rate = 1 }

[[parts]]
rate = 1.0
[[parts]]
rate = 2
share = 0.25
"""

BAD = {
    "nothing = here": ("", ":1: name must be given: got nothing."),
    "not TOML": (GOOD + "x = \n", ":11: file must be TOML: got 'Invalid value'."),
    "a table that does not end": ("name = 'a'\n[part\n", ":2: file must be TOML: got"),
    "a missing field of a table": (GOOD.replace("rate = 2", ""), ":8: parts[1].rate must be given"),
    "an unknown key": (GOOD + "rates = 2\n", ":11: parts[1].rates must be a known field: got"),
    "an unknown table": (GOOD + "[else]\n", ":11: else must be a known field: got 'else'."),
    "a limit": (GOOD.replace("rate = 2", "rate = -2"), ":9: parts[1].rate must be more than 0"),
    "not a number": (GOOD.replace("rate = 2", "rate = nan"), ":9: parts[1].rate must be more tha"),
    "infinite": (GOOD.replace("rate = 2", "rate = inf"), ":9: parts[1].rate must be more than 0"),
    "text for a number": (GOOD.replace("3", "'3'"), ":2: count must be a whole number: got '3'."),
    "a fraction": (GOOD.replace("= 3", "= 3.5"), ":2: count must be a whole number: got 3.5."),
    "a truth": (GOOD.replace("= 3", "= true"), ":2: count must be a whole number: got True."),
    "a number for a truth": ("on = 1\n" + GOOD, ":1: on must be true or false: got 1."),
    "a choice": (GOOD.replace('"a"', '"c"'), ":1: name must be one of a, b: got 'c'."),
    "an item": (GOOD.replace("2.5", "0"), ":3: sizes must be more than 0: got (1.0, 0.0)."),
    "an item's type": (GOOD.replace("2.5", "'x'"), ":3: sizes[1] must be a number: got 'x'."),
    "no list": (GOOD.replace("[1, 2.5]", "1"), ":3: sizes must be a list: got 1."),
    "inside a line": (GOOD.replace("rate = 1 }", "rate = 0 }"), ":4: part.rate must be more than"),
    "no table": (GOOD.replace("{ rate = 1 }", "7"), ":4: part must be a table: got 7."),
    "dotted": (GOOD.replace("part = { rate = 1 }", "part.rate = 0"), ":4: part.rate must be more"),
    "between fields": (GOOD.replace("= 3", "= 300"), ":1: file is refused: count must be at most"),
    "after a long text": ("name = '''\ncount = 1'''\n", ":1: name must be one of a, b: got"),
}


def test_a_good_file_becomes_its_dataclass(tmp_path):
    path = tmp_path / "good.toml"
    path.write_text(GOOD)
    parts = (Part(1.0), Part(2.0, 0.25))
    assert read(path, Whole) == Whole("a", 3, Part(1.0), parts, (1.0, 2.5))


@pytest.mark.parametrize("text, expected", BAD.values(), ids=BAD)
def test_a_bad_file_is_refused_in_one_line_with_line_and_field(tmp_path, text, expected):
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(SpecError) as error:
        read(path, Whole)
    assert str(error.value).startswith(f"{path}{expected}")
    assert "\n" not in str(error.value)


@dataclass(frozen=True)
class Note(Checked):
    text: str = spec()
    rate: float = spec(POSITIVE)


def test_text_of_many_lines_is_no_key(tmp_path):
    path = tmp_path / "note.toml"
    path.write_text('text = """\nrate = 1\n[table]\n"""\nrate = 0\n')
    with pytest.raises(SpecError, match=r"note.toml:5: rate must be more than 0: got 0.0\."):
        read(path, Note)


def test_an_error_in_a_spec_names_the_rule(tmp_path):
    path = tmp_path / "gpu.toml"
    path.write_text(find("gpus", "h100").read_text().replace("hbm_gb_s = 3350", "hbm_gb_s = -3"))
    with pytest.raises(SpecError, match=r"gpu.toml:3: hbm_gb_s must be more than 0: got -3.0\."):
        specs.load("gpu", path)


def test_what_is_no_file_or_no_name_is_refused(tmp_path):
    with pytest.raises(SpecError, match="gpus must hold h300: got a100-40gb, "):
        specs.load("gpu", "h300")
    with pytest.raises(SpecError, match="readable TOML file: got No such file"):
        specs.load("gpu", tmp_path / "none.toml")
    (tmp_path / "bytes.toml").write_bytes(b"\xff")
    with pytest.raises(SpecError, match="readable TOML file: got not UTF-8"):
        specs.load("gpu", tmp_path / "bytes.toml")


def test_rules_hold_for_records_made_in_code():
    with pytest.raises(SpecError, match="accepted_tokens must be at most queries: got 3, limit 2"):
        specs.changed(specs.load("deployment", "node-8"), accepted_tokens=3.0)
    with pytest.raises(SpecError, match=r"must know its fields: got \['hbm'\]"):
        specs.changed(specs.load("gpu", "h100"), hbm=3)
    with pytest.raises(ValueError, match="nominal_gb_s must be the largest"):
        specs.Link(10, 20, 5)
    with pytest.raises(SpecError, match="host_gib must be 0 or more: got -1."):
        specs.changed(specs.load("deployment", "node-8"), host_gib=-1.0)


def kernels_json(path: Path, **changes) -> Path:
    def row(name, gb_per_s, **config):
        return {"name": name, "kind": "measured", "gb_per_s": gb_per_s, "config": config}

    def fetch(system, gb_per_s, batch=16, misses=64, row_bytes=656):
        return row("fetch", gb_per_s, system=system, batch=batch, misses=misses,
                   row_bytes=row_bytes)  # fmt: skip

    rows = [
        row("pcie_peak", 55.0, direction="h2d"), row("pcie_peak", 52.0, direction="d2h"),
        fetch("triton", 48.0), fetch("triton", 50.0, misses=256), fetch("triton", 51.0, batch=64),
        fetch("cuda", 40.0), fetch("memcpy_batch", 54.0),
        *(fetch("triton", 9.0, batch=1) for _ in range(4)),
        *(fetch("triton", 9.0, misses=2) for _ in range(4)),
        fetch("cuda", 54.0, row_bytes=1152),
    ]  # fmt: skip
    costs = {"empty_us": 9.0, "halving_us": 4.0}
    path.write_text(json.dumps({"rows": rows, "overlap_costs": costs} | changes))
    return path


def test_measurements_of_a_card_replace_what_was_read(tmp_path):
    link, calibration = specs.from_kernels(
        kernels_json(tmp_path / "k.json"),
        specs.load("link", "pcie5"), specs.load("calibration", "ess-paper"),
    )  # fmt: skip
    assert link == specs.Link(nominal_gb_s=55.0, gather_gb_s=50.0, scatter_gb_s=52.0)
    found = (calibration.transfer_ratio, calibration.da_us, calibration.dba_us)
    assert found == (1.0, 9.0, 13.0)
    assert calibration.layer_us == specs.load("calibration", "ess-paper").layer_us


@pytest.mark.parametrize(
    "changes", [{"rows": []}, {"overlap_costs": None}, {"rows": [{"name": "fetch"}]}]
)
def test_a_file_without_measurements_is_refused(tmp_path, changes):
    path = kernels_json(tmp_path / "k.json", **changes)
    with pytest.raises(SpecError, match="must hold rows pcie_peak and fetch and a cost table"):
        specs.from_kernels(path, specs.load("link", "pcie5"), None)

"""--ess-store: what it may name, what it sets, and what it cannot be combined with."""

import json

import pytest

from sglang_ess.errors import Refusal
from sglang_ess.launch.store_option import UNITS, StoreSpec
from sglang_ess.mem_cache import linker
from tests.support.launching import DSA, refused


@pytest.mark.parametrize(
    ("size", "expected"),
    [("1GiB", UNITS["GiB"]), ("1.5MiB", 3 << 19), ("0.001TiB", int(0.001 * UNITS["TiB"]))],
)
def test_a_size(tmp_path, size, expected):
    assert StoreSpec.parse(f"{tmp_path}/new:{size}") == (tmp_path / "new", expected)


def test_without_a_size_it_is_half_of_the_file_system(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("", (), {"total": 10_000}))
    assert StoreSpec.parse(str(tmp_path)).limit_bytes == 5_000


@pytest.mark.parametrize("size", ["0GiB", "3", "5parsecs"])
def test_no_size(tmp_path, size):
    with pytest.raises(Refusal, match="must be PATH.*above 0 in MiB, GiB or TiB"):
        StoreSpec.parse(f"{tmp_path}:{size}")


def test_no_directory(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "none" / "store"):
        with pytest.raises(Refusal, match="--ess-store must name a directory"):
            StoreSpec.parse(str(path))
    with pytest.raises(Refusal, match="must fit into its file system"):
        StoreSpec.parse(f"{tmp_path}:900000TiB")


def test_it_sets_sglangs_linker(launch, tmp_path):
    store = tmp_path / "store"
    args, lines = launch("--ess-store", f"{store}:1GiB")
    assert lines == []
    assert args.enable_unified_cache_external_linker
    assert args.unified_cache_external_linker_backend == "dynamic"
    options = args.unified_cache_external_linker_config
    assert getattr(linker, options["linker"]).__module__ == options["linker_module_path"]
    assert options["linker_extra_config"] == {"path": str(store), "limit_bytes": UNITS["GiB"]}
    assert json.loads(json.dumps(options)) == options
    assert not launch()[0].enable_unified_cache_external_linker


@pytest.mark.parametrize(
    "flags",
    [
        ("--disable-radix-cache",),
        ("--enable-unified-cache-external-linker",),
        ("--pp-size", "2", "--ess-admission", "off"),
        ("--disaggregation-mode", "decode"),
        ("--disaggregation-mode", "prefill"),
        ("--tp-size", "2"),
        ("--dp-size", "2"),
    ],
)
def test_what_it_is_not_combined_with(launch, tmp_path, flags):
    given = launch("--ess-store", str(tmp_path / "store"), *flags)
    refused(given, flags[0], "with --ess-store", "Drop one of the two")


def test_models_and_tiers(launch, tmp_path):
    store = "--ess-store", str(tmp_path / "store")
    refused(launch(*store, model={**DSA, "index_kpool": 4}), "an index key for each token")
    assert launch(*store, "--disable-ess")[1] == []
    given = launch(*store, "--disable-ess", accelerator="cuda")
    refused(given, "--ess-store must have two tiers on a GPU")


LINKER = ("--enable-unified-cache-external-linker", "--unified-cache-external-linker-backend")


def test_another_linker_is_refused(launch):
    """It would fill rows that two tiers and the CPU platform have read by then."""
    for accelerator in (None, "cuda"):
        given = launch(*LINKER, "mooncake", **({"accelerator": accelerator} if accelerator else {}))
        refused(given, LINKER[0], "got another", "Use --ess-store")
    one_tier = launch(*LINKER, "mooncake", "--disable-ess", accelerator="cuda")
    assert one_tier[1] == []


def test_the_long_way(launch, tmp_path):
    options = {
        "linker": "EssLinker",
        "linker_module_path": linker.__name__,
        "linker_extra_config": {"path": str(tmp_path / "store"), "limit_bytes": UNITS["GiB"]},
    }
    config = "--unified-cache-external-linker-config", json.dumps(options)
    args, lines = launch(*LINKER, "dynamic", *config)
    assert lines == [] and args.enable_unified_cache_external_linker

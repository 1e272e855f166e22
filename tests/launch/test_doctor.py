"""The doctor: what it reports, and when it says that something is wrong."""

import errno
import json
import os
import re
import resource
from pathlib import Path

import pytest

from ess_patches.contract import Hook, signature_text
from sglang_ess.config import ENV_VAR, EssConfig
from sglang_ess.launch import doctor
from sglang_ess.tiers import host_memory

GOOD = Hook("os.path.join", "call", signature_text("os.path.join"), "us", "It is there.")


@pytest.fixture(autouse=True)
def rows(monkeypatch):
    """rows(*hooks) sets the contract. The CPU platform is chosen, so a GPU changes nothing."""
    monkeypatch.setenv(ENV_VAR, EssConfig(platform="cpu").to_env()[ENV_VAR])

    def put(*hooks):
        monkeypatch.setattr("ess_patches.all_hooks", lambda: hooks)

    put(GOOD)
    return put


def run(capsys, *argv):
    status = doctor.main(list(argv))
    return status, capsys.readouterr().out


def test_json_report(capsys):
    status, out = run(capsys, "--json")
    report = json.loads(out)
    assert status == 0 and report["problems"] == []
    assert report["versions"]["sglang"] == "0.5.23"
    assert report["device"]["platform"] == "cpu" and report["summary"].startswith("CPU platform")
    served = report["architectures"]
    assert served["GlmMoeDsaForCausalLM"] == "served"
    assert "mistral_large_3.py" in served["MistralLarge3ForCausalLM"]
    host = report["host"]
    assert host["cores"] >= 1
    assert 0 < host["memory_available_bytes"] < host["memory_total_bytes"]
    assert host["shared_memory"] == "yes"
    words = (None, "always", "within_size", "advise", "never", "deny", "force")
    assert host["shared_huge_pages"] in words
    assert report["contract"] == [
        {
            "state": "ok",
            "kind": "call",
            "when": "always",
            "target": "os.path.join",
            "detail": "It is there.",
        }
    ]


def test_a_host_on_which_ranks_cannot_share_memory(capsys, monkeypatch):
    def refused(name):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "memfd_create", refused)
    monkeypatch.setattr(host_memory, "THP", Path("/nowhere"))
    monkeypatch.setattr(resource, "getrlimit", lambda limit: (3 << 20, 3 << 20))
    out = run(capsys)[1]
    for line in (
        r"shared_memory +no \(memfd_create: Operation not permitted\)",
        r"shared_memory_limit_bytes +3 MiB",
        r"shared_huge_pages +none",
    ):
        assert re.search(line, out)


def test_text_report(capsys):
    status, out = run(capsys)
    assert status == 0
    for part in ("sglang  ", "0.5.23", "GiB", "contract (1 rows)", "ok ", "ESS here: CPU platform"):
        assert part in out
    assert out.endswith("no problems\n")


@pytest.mark.parametrize(
    ("target", "signature", "state"),
    [("os.path.gone", "()", "missing"), ("os.path.join", "(a)", "changed")],
)
def test_a_mismatch_is_a_problem(capsys, rows, target, signature, state):
    rows(GOOD, Hook(target, "call", signature, "us", "A test."))
    status, out = run(capsys)
    assert status == 1
    assert f"  {state:<8} call" in out and f"problem: {target} must be as in SGLang" in out


def test_a_row_of_another_platform_is_shown_but_no_problem(capsys, rows):
    rows(Hook("os.path.gone", "call", "()", "us", "A test.", when="cuda"))
    status, out = run(capsys)
    assert status == 0 and "missing  call      cuda" in out


@pytest.mark.parametrize(
    ("package", "version", "part"),
    [("numba", None, "numba must be installed"), ("sglang", "0.5.24", "got 0.5.24")],
)
def test_a_wrong_package_is_a_problem(capsys, monkeypatch, package, version, part):
    from importlib import metadata

    real = metadata.version

    def fake(name):
        if name != package:
            return real(name)
        if version is None:
            raise metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(metadata, "version", fake)
    status, out = run(capsys)
    assert status == 1 and part in out


def test_a_missing_cuda_compiler_is_a_problem_on_a_gpu(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert doctor.compiler_problems("cpu") == []
    (line,) = doctor.compiler_problems("cuda")
    assert line.startswith("nvcc must be there") and "CUDA_HOME" in line


def test_where_a_host_tier_would_lie(capsys, monkeypatch, tmp_path):
    import torch

    (tmp_path / "meminfo").write_text("MemAvailable: 9 kB\nAnonHugePages:  4194304 kB\n")
    monkeypatch.setattr("sglang_ess.tiers.host_memory.MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr("sglang_ess.tiers.host_memory.huge_page_bytes", lambda: 2 << 20)
    monkeypatch.setattr("sglang_ess.tiers.numa.num_nodes", lambda: 2)
    monkeypatch.setattr("sglang_ess.tiers.numa.node_of_gpu", [1, None].__getitem__)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    shown = run(capsys)[1]
    for line in (
        "gpu_numa_nodes             1, None",
        "numa_nodes                 2",
        "huge_page_bytes            2 MiB",
        "huge_pages_used_bytes      4.00 GiB",
    ):
        assert f"  {line}\n" in shown
    (tmp_path / "meminfo").write_text("MemAvailable: 9 kB\n")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    shown = run(capsys)[1]
    assert (
        "huge_pages_used_bytes      none\n" in shown
        and "gpu_numa_nodes             none\n" in shown
    )


def test_the_cgroup_limit_is_in_the_report(capsys, monkeypatch):
    monkeypatch.setattr("sglang_ess.tiers.cgroup.limit_bytes", lambda: 3 << 30)
    assert "memory_cgroup_limit_bytes  3.00 GiB" in run(capsys)[1]

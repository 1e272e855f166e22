"""`python -m sglang_ess.doctor [--json]`: what this host has and what ESS can do on it.

The exit status is 1 if a requirement is not met: SGLang's version, the contract, a package.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import resource
import sys
from typing import Any

from sglang_ess.config import EssConfig
from sglang_ess.errors import program_name
from sglang_ess.layout import GIB

REQUIRED = ("sglang", "torch", "numba", "transformers", "psutil")
OPTIONAL = ("triton", "flashinfer-python")
# Features that speed up the CPU platform's kernels, as LLVM (numba's code generator) names them.
CPU_FEATURES = ("avx2", "avx512f", "avx512bw", "avx512bf16", "amx-bf16")


def examine() -> dict[str, Any]:
    """Everything the report prints; "problems" has one line for each requirement not met.

    Effect: imports SGLang as a server does. For that it sets SGLANG_ESS_CONFIG, if it is unset.
    Raises: SystemExit if SGLANG_ESS_CONFIG is malformed.
    """
    versions = {name: _version(name) for name in REQUIRED + OPTIONAL}
    problems = [
        f"{name} must be installed: got none. Run pip install {name}."
        for name in REQUIRED
        if versions[name] is None
    ]
    report: dict[str, Any] = {"versions": {"python": platform.python_version(), **versions}}
    if not problems:
        for key, value in EssConfig().to_env().items():
            os.environ.setdefault(key, value)
        report |= {"device": device(), "host": host()}
        rows, problems = contract_rows(report["device"]["platform"])
        problems += compiler_problems(report["device"]["platform"])
        report |= {"architectures": architectures()}
        report |= {"contract": rows, "summary": summary(report["device"]["platform"])}
    return report | {"problems": problems}


def device() -> dict[str, Any]:
    """The platform that SGLang will choose, and whether it can pin host memory.

    gpu_numa_nodes: of each visible CUDA device; None for one whose node the kernel does not know
    """
    import torch

    from ess_kernels import cuda_build
    from sglang_ess import plugin
    from sglang_ess.tiers import numa

    kind = plugin.accelerator()
    name = getattr(torch, kind).get_device_name() if kind else None
    try:
        torch.empty(1, pin_memory=True)
        pinned = "yes"
    except RuntimeError as error:
        pinned = f"no ({str(error).splitlines()[0]})"
    return {
        "platform": plugin.active_platform(),
        "accelerator": f"{kind}: {name}" if kind else None,
        "gpu_numa_nodes": [numa.node_of_gpu(i) for i in range(torch.cuda.device_count())],
        "nvcc": str(cuda_build.nvcc() or "none"),
        "pinned_memory": pinned,
        "memlock_limit_bytes": _limit_bytes(resource.RLIMIT_MEMLOCK),
    }


def host() -> dict[str, Any]:
    """Cores and memory that this process may use. A cgroup limit of None means there is none.

    huge_page_bytes: of the pages that a GPU's host tier asks for; 0 if the kernel gives none
    huge_pages_used_bytes: AnonHugePages, of all processes: while a server with ESS runs on a GPU,
        most of its host tier should be there, or in shared_huge_used_bytes (ShmemHugePages) if
        ranks share it
    shared_memory: whether ranks can share a host tier; shared_memory_limit_bytes: RLIMIT_FSIZE,
        which it must not exceed
    shared_huge_pages: when shared memory gets huge pages: it must be advise, always or within_size
    """
    import llvmlite.binding as llvm
    import psutil

    from sglang_ess.tiers import cgroup, host_memory, numa

    memory = psutil.virtual_memory()
    features = llvm.get_host_cpu_features()
    return {
        "cores": len(os.sched_getaffinity(0)),
        "memory_total_bytes": memory.total,
        "memory_available_bytes": memory.available,
        "memory_cgroup_limit_bytes": cgroup.limit_bytes(),
        "numa_nodes": numa.num_nodes(),
        "huge_page_bytes": host_memory.huge_page_bytes(),
        "huge_pages_used_bytes": host_memory.meminfo_bytes("AnonHugePages"),
        "shared_memory": _shared_memory(),
        "shared_memory_limit_bytes": _limit_bytes(resource.RLIMIT_FSIZE),
        "shared_huge_pages": host_memory.shared_huge_pages() or None,
        "shared_huge_used_bytes": host_memory.meminfo_bytes("ShmemHugePages"),
        "cpu_features": [name for name in CPU_FEATURES if features.get(name)],
    }


def architectures() -> dict[str, str]:
    """Give "served", or what is missing, for each architecture with sparse attention."""
    from sglang_ess.launch.architectures import ARCHITECTURES

    return {name: one.missing or "served" for name, one in ARCHITECTURES.items()}


def compiler_problems(active: str) -> list[str]:
    """One line if the CUDA C++ operations are needed and cannot be compiled here."""
    from ess_kernels import cuda_build

    lacks = cuda_build.missing() if active == "cuda" else None
    return [lacks] if lacks else []


def contract_rows(active: str) -> tuple[list[dict[str, str]], list[str]]:
    """(a row for each hook with its state, problems of the hooks that this platform uses)."""
    from ess_patches import all_hooks, contract

    hooks = all_hooks()
    problems = [str(mismatch) for mismatch in contract.check(())]  # SGLang's version
    rows, broken = [], False
    for hook in hooks:
        mismatch = contract.check_hook(hook)
        if mismatch and hook.applies(active):
            if mismatch.state != contract.BROKEN or not broken:
                problems.append(str(mismatch))
            broken |= mismatch.state == contract.BROKEN  # the other rows would repeat it
        rows.append(
            {
                "state": mismatch.state if mismatch else "ok",
                "kind": hook.kind,
                "when": hook.when,
                "target": hook.target,
                "detail": mismatch.found if mismatch else hook.reason,
            }
        )
    return rows, problems


def summary(active: str) -> str:
    """One line: what ESS can do on this host now."""
    if active == "cpu":
        return "CPU platform: DSA models run in full, for function and tests, not for speed."
    if active == "cuda":
        return "CUDA: two tiers; docs/gpu.md lists what has run on a device."
    return f"Nothing: ESS must have the CPU platform or CUDA: got {active}."


def render(report: dict[str, Any]) -> str:
    """The report as text, one fact per line."""
    lines = []
    for section in ("versions", "device", "host", "architectures"):
        lines.append(section)
        for name, value in report.get(section, {}).items():
            lines.append(f"  {name:<26} {_shown(name, value)}")
    rows = report.get("contract", [])
    lines.append(f"contract ({len(rows)} rows)")
    for row in rows:
        lines.append(f"  {row['state']:<8} {row['kind']:<9} {row['when']:<7} {row['target']}")
        lines.append(f"           {row['detail']}")
    lines.append(f"ESS here: {report.get('summary', 'nothing, see the problems')}")
    lines += [f"problem: {line}" for line in report["problems"]] or ["no problems"]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Print the report. Returns 1 if it lists problems, else 0."""
    parser = argparse.ArgumentParser(
        prog=program_name("doctor"),
        description="Report what this host has and what ESS can do on it. The exit status is 1 if "
        "a requirement is not met: SGLang's version, the contract, a package.",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)
    report = examine()
    print(json.dumps(report, indent=2) if args.json else render(report))
    return 1 if report["problems"] else 0


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _shared_memory() -> str:
    try:
        os.close(os.memfd_create("ess-doctor"))
    except OSError as error:  # a container's seccomp profile may forbid it
        return f"no (memfd_create: {error.strerror})"
    return "yes"


def _limit_bytes(limit: int) -> int | None:
    soft = resource.getrlimit(limit)[0]
    return None if soft == resource.RLIM_INFINITY else soft


def _shown(name: str, value: Any) -> str:
    if value is None:
        return "none"
    if name.endswith("_bytes"):
        return f"{value / GIB:.2f} GiB" if value >= GIB else f"{value / (1 << 20):.0f} MiB"
    return (", ".join(map(str, value)) or "none") if isinstance(value, list) else str(value)


if __name__ == "__main__":
    sys.exit(main())

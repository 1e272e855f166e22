"""docs/kernel_resources.md: registers, shared and local memory of every CUDA kernel.

    python -m tests.kernels.cuda_host.resources --write

The figures are those of the libraries that ess_kernels.cuda_build makes.
"""

import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import triton

from ess_kernels.cuda_build import NAMES, build

TABLE = Path(__file__).resolve().parents[3] / "docs" / "kernel_resources.md"
ARCH = "9.0a"
HEAD = """# What the CUDA kernels take

Per thread and block, for sm_{arch} ({compiler}). A kernel that spills registers has local memory.
A test builds the libraries with warnings as errors, compares them with this table and refuses
local memory. To renew the table: `python -m tests.kernels.cuda_host.resources --write`.
Template arguments: of the copies the 16-byte words of a row, 0 for any; of plan the lookups of a
thread, and whether one block does it all. Shared bytes are those that the library states; 1,024
of each figure above 0 are the system's.

| kernel | registers | shared bytes | local bytes |
|---|---|---|---|
"""


@dataclass(frozen=True)
class Resources:
    kernel: str
    registers: int
    shared_bytes: int
    local_bytes: int

    @property
    def line(self) -> str:
        return f"| `{self.kernel}` | {self.registers} | {self.shared_bytes} | {self.local_bytes} |"


def compiler_release() -> str | None:
    """ "nvcc 13.0", or None where there is no nvcc."""
    if shutil.which("nvcc") is None:
        return None
    said = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    return f"nvcc {re.search(r'release ([0-9.]+)', said)[1]}"


def demangled(name: str) -> str:
    text = subprocess.run(["c++filt", name], capture_output=True, text=True, check=True).stdout
    return re.match(r"(?:void )?(?:ess::)?(.*)\(.*", text.strip())[1].replace("(bool)", "")


def cuobjdump(option: str, library: str) -> str:
    """What Triton's cuobjdump prints about a library."""
    command = [triton.knobs.nvidia.cuobjdump.path, option, library]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def wide_accesses(library: str) -> dict[str, str]:
    """Each kernel's 16-byte accesses in machine code's order, L for a load and S for a store."""
    found = {}
    for part in cuobjdump("--dump-sass", library).split("Function : ")[1:]:
        name = part[: part.index("\n")].strip()
        accesses = re.findall(r"\b(LDG|STG)\.[\w.]*128", part)
        found[demangled(name)] = "".join("S" if a == "STG" else "L" for a in accesses)
    return found


def read(library: str) -> list[Resources]:
    """The kernels of a library. One that spills has a stack."""
    log, found = cuobjdump("--dump-resource-usage", library), []
    for name, usage in re.findall(r"Function (\w+):\s*(.*)", log):
        numbers = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", usage)}
        local = numbers["STACK"] + numbers["LOCAL"]
        found.append(Resources(demangled(name), numbers["REG"], numbers["SHARED"], local))
    return found


def measure() -> list[Resources]:
    found = (entry for name in NAMES for entry in read(build(name, ARCH)))
    return sorted(found, key=lambda entry: entry.kernel)


def render(entries: list[Resources]) -> str:
    head = HEAD.format(arch=ARCH.replace(".", ""), compiler=compiler_release())
    return head + "".join(f"{entry.line}\n" for entry in entries)


def main() -> None:
    text = render(measure())
    if "--write" in sys.argv[1:]:
        TABLE.parent.mkdir(exist_ok=True)
        TABLE.write_text(text)
    print(text)


if __name__ == "__main__":
    main()

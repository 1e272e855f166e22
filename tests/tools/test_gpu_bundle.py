"""tools/gpu_bundle.sh and gpu_install.sh: wheels leave in parts, arrive one after the other, and
become an environment that finds our plugin; what is missing or spoilt is said. No network, no GPU.
"""

import base64
import csv
import hashlib
import importlib.util
import os
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
MIB = 1 << 20


def load(name):
    spec = importlib.util.spec_from_file_location(name, REPO / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


gpu_site, gpu_slim = load("gpu_site"), load("gpu_slim")


def checksum(content):
    digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest())
    return "sha256=" + digest.rstrip(b"=").decode()


def make_wheel(folder, name, files, version="1.0"):
    """A wheel of `files` (path: content), with RECORD; returns its path."""
    info = f"{name}-{version}.dist-info"
    files = files | {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    rows = [f"{path},{checksum(content)},{len(content)}\n" for path, content in files.items()]
    path = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        for inner, content in (files | {f"{info}/RECORD": "".join(rows)}).items():
            wheel.writestr(inner, content)
    return path


def run(*command, folder, **environment):
    environment |= {"LISTED": str(folder / "list.txt"), "JOINED": str(folder / "joined")}
    return subprocess.run(
        [str(part) for part in command], cwd=REPO, capture_output=True, text=True,
        env={**os.environ, "PYTHON": sys.executable, "XZ_OPT": "-0", **environment},
    )  # fmt: skip


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A bundle of a large wheel, which travels in two pieces, and a small one."""
    folder = tmp_path_factory.mktemp("bundle")
    (folder / "index").mkdir()
    body = b"DATA = " + repr(os.urandom(MIB)).encode() + b"\n"  # over 1 MiB, however compressed
    make_wheel(folder / "index", "ess_tiny_large", {"ess_tiny_large.py": body})
    make_wheel(folder / "index", "ess_tiny_small", {"ess_tiny_small.py": b"ANSWER = 42\n"})
    (folder / "list.txt").write_text(
        "kernels ess-tiny-small ess_tiny_small # why\nserving ess-tiny-large ess_tiny_large\n"
    )
    done = run(
        "tools/gpu_bundle.sh", "--for", "serving", "--part-mib", 1, "--to", folder / "parts",
        folder=folder, PIP_NO_INDEX="1", PIP_FIND_LINKS=str(folder / "index"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


def install(folder, source, venv):
    return run("tools/gpu_install.sh", sys.executable, source, venv, folder=folder)


def test_no_part_is_over_its_limit(parts):
    folders = sorted((parts / "parts").iterdir())
    sizes = [sum(file.stat().st_size for file in part.iterdir()) for part in folders]
    assert len(sizes) == 2 and max(sizes) <= MIB and max(sizes) > 0.99 * MIB
    assert len(list((parts / "parts").rglob("ess_tiny_large*.piece*"))) == 2


def test_parts_install_as_they_come_and_the_last_one_finishes(parts, tmp_path):
    (tmp_path / "list.txt").write_text((parts / "list.txt").read_text())
    first, second = sorted((parts / "parts").iterdir())
    venv = tmp_path / "venv"
    early = install(tmp_path, first, venv)
    assert early.returncode == 1, early.stderr
    assert "ess_tiny_large-1.0-py3-none-any.whl: in a part that is not here" in early.stderr
    done = install(tmp_path, second, venv)
    assert done.returncode == 0, done.stderr
    program = """if True:
        import ess_tiny_large, ess_tiny_small, importlib.metadata as metadata, os, sglang_ess
        plugins = metadata.entry_points(group="sglang.srt.plugins")
        print(len(ess_tiny_large.DATA), ess_tiny_small.ANSWER, sglang_ess.__file__)
        print({point.name: point.value for point in plugins}["sglang_ess"])
        print(metadata.distribution("sglang-ess").locate_file(""), os.environ["HF_HUB_OFFLINE"])
        """
    command = [venv / "bin/python", "-c", program]
    seen = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    lines = seen.stdout.splitlines()
    assert lines[0] == f"{MIB} 42 {REPO}/python/sglang_ess/__init__.py", seen.stderr
    assert lines[1] == "sglang_ess.plugin:register"
    assert lines[2] == f"{next(venv.glob('lib/python3*/site-packages'))} 1"


def test_what_the_list_names_and_nobody_has_is_said_by_name(parts, tmp_path):
    (tmp_path / "list.txt").write_text(
        "kernels ess-tiny-absent\nhost ess-tiny-of-host\nserving pip ess_tiny_no_module\n"
    )
    (tmp_path / "wheels").mkdir()
    done = install(tmp_path, tmp_path / "wheels", tmp_path / "venv")
    assert done.returncode == 1
    said = [line for line in done.stderr.splitlines() if line.startswith("gpu_install:")]
    assert len(said) == 3, done.stderr
    assert "ess-tiny-absent: must be there: got None. Carry the part that has it" in said[0]
    assert "ess-tiny-of-host: expected of the host" in said[1] and "--for serving" in said[1]
    assert "pip: import ess_tiny_no_module fails" in said[2]


def test_a_spoilt_piece_is_refused_before_it_is_taken(parts, tmp_path):
    (tmp_path / "list.txt").write_text("")
    part = tmp_path / "part"
    part.mkdir()
    for file in (parts / "parts" / "part1").iterdir():
        (part / file.name).write_bytes(file.read_bytes())
    piece = next(part.glob("*.piece*"))
    content = bytearray(piece.read_bytes())
    content[len(content) // 2] ^= 1
    piece.write_bytes(content)
    done = run("tools/gpu_bundle.sh", "--join", part, tmp_path / "joined", folder=tmp_path)
    assert done.returncode == 1 and "must have the checksums it left with" in done.stderr
    assert not list((tmp_path / "joined").glob("*.piece*"))


def test_the_list_names_pinned_distributions_once():
    rows = [line.split("#")[0].split() for line in (REPO / "tools/gpu_wheels.txt").open()]
    rows = [row for row in rows if row]
    names = [gpu_site._normal(row[1]) for row in rows]
    assert len(names) == len(set(names)) and {row[0] for row in rows} == {
        "kernels", "serving", "host",
    }  # fmt: skip
    carried = {name for name, row in zip(names, rows, strict=True) if row[0] != "host"}
    assert carried <= gpu_site._pins().keys()


def test_another_version_than_the_pinned_one_is_said(monkeypatch):
    monkeypatch.setattr(gpu_site, "_pins", lambda: {"pip": "0.1"})
    assert gpu_site._absence("serving", "pip").startswith("must be 0.1: got ")
    assert gpu_site._absence("host", "pip") is None


# --- gpu_slim.py --------------------------------------------------------------------------


def entry(kind, architecture, payload):
    header = struct.pack("<HHIQ12xI32x", kind, 0x101, 64, len(payload), architecture)
    return header + payload


def fat_binary(*entries):
    body = b"".join(entries)
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(body)) + body


SASS, PTX = 2, 1
OLD, OURS = entry(SASS, 80, b"o" * 40), entry(SASS, 90, b"h" * 24)
NEW, SMALL = entry(SASS, 100, b"b" * 48), entry(SASS, 120, b"s" * 8)


@pytest.mark.parametrize(
    ("entries", "kept"),
    [
        ((OLD, OURS, NEW), OURS),
        ((entry(PTX, 80, b"p" * 16), OURS), entry(PTX, 80, b"p" * 16) + OURS),
        ((OURS, entry(PTX, 120, b"q" * 16)), OURS),
        ((NEW, SMALL), SMALL),  # nothing for the card: the driver shall say so
        ((OURS,), OURS),
    ],
)
def test_a_fat_binary_keeps_what_a_hopper_runs(entries, kept):
    before, after = b"\x7fELF" + b"code" * 9, b"data" * 7
    library = bytearray(before + fat_binary(*entries) + after)
    size = len(library)
    freed = gpu_slim.keep_one_architecture(library)
    packed = fat_binary(kept)
    assert library == before + packed + b"\0" * freed + after
    assert len(library) == size and freed == sum(map(len, entries)) - len(kept)


def test_bytes_that_only_look_like_a_fat_binary_stay():
    magic = 0xBA55ED50
    stray = struct.pack("<IHHQIHHQ", magic, 7, 16, 8, magic, 1, 16, 1 << 40)
    library = bytearray(stray + fat_binary(OLD, OURS))
    gpu_slim.keep_one_architecture(library)
    assert library.startswith(stray + fat_binary(OURS))
    with pytest.raises(ValueError, match=r"entry must be PTX \(1\) or SASS \(2\).*got kind 9"):
        gpu_slim.keep_one_architecture(bytearray(fat_binary(entry(9, 90, b""))))


def test_a_slim_wheel_installs_as_its_record_says(tmp_path):
    library = fat_binary(OLD, OURS, NEW)
    wheel = make_wheel(tmp_path, "sglang_kernel", {
        "sgl_kernel/sm90/common_ops.abi3.so": library,
        "sgl_kernel/sm100/common_ops.abi3.so": library,
        "sgl_kernel/flash_ops.abi3.so": library,
        "sgl_kernel/flash_attn.py": b"import flash_ops\n",
    })  # fmt: skip
    (tmp_path / "slim").mkdir()
    slim = zipfile.ZipFile(gpu_slim.slim(wheel, tmp_path / "slim"))
    names = set(slim.namelist())
    assert {name for name in names if "dist-info" not in name} == {
        "sgl_kernel/sm90/common_ops.abi3.so", "sgl_kernel/flash_attn.py",
    }  # fmt: skip
    record = slim.read("sglang_kernel-1.0.dist-info/RECORD").decode()
    rows = {name: (digest, int(size)) for name, digest, size in csv.reader(record.splitlines())}
    assert rows == {
        name: (checksum(slim.read(name)), len(slim.read(name)))
        for name in names if not name.endswith("RECORD")
    }  # fmt: skip

"""The wheel contains the whole source tree, and works without the rest of the checkout.

The environment of these tests has the packages of this one (SGLang above all), except for the
editable install of this checkout: a path in a .pth file does not run the .pth files in it.
"""

import json
import os
import re
import shutil
import site
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from ess_patches import all_hooks
from tools.processes import HttpProcess

REPO = Path(__file__).resolve().parents[2]
ROOTS = {"sglang_ess": "python", "ess_kernels": "kernels", "ess_patches": "patches"}
CHECKOUT_VARIABLES = ("PYTHONPATH", "SGLANG_ESS_CONFIG", "SGLANG_PLATFORM", "NUMBA_CACHE_DIR")


def run(command, **options):
    ended = subprocess.run(
        list(map(str, command)), stdin=subprocess.DEVNULL, capture_output=True, text=True, **options
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy: setuptools would reuse an old build/ of the checkout."""
    root = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(REPO / name, root)
    for package, folder in ROOTS.items():
        shutil.copytree(
            REPO / folder / package,
            root / folder / package,
            ignore=shutil.ignore_patterns("__pycache__"),
        )
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    run([*pip, "wheel", "--no-deps", "--no-index", "--no-build-isolation", "-w", root, root])
    (file,) = root.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The bin directory of an environment that has the wheel and this environment's packages."""
    root = tmp_path_factory.mktemp("environment")
    run([sys.executable, "-m", "venv", "--without-pip", root])
    packages = site_packages(root)
    (packages / "outer.pth").write_text("\n".join(site.getsitepackages()))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    pip += ["--python", root / "bin" / "python", "install"]
    run([*pip, "--no-deps", "--no-index", "--no-compile", wheel], env=clean_environment(root))
    reuse_machine_code(packages)
    return root / "bin"


def site_packages(root):
    (packages,) = root.glob("lib/python*/site-packages")
    return packages


def reuse_machine_code(packages):
    """Let numba use what it compiled for the checkout, because compiling takes 20 s.

    Its cache is in __pycache__, and is valid for a source file of the same time and size.
    """
    for package, folder in ROOTS.items():
        for source in (REPO / folder / package).rglob("*.py"):
            copy = packages / source.relative_to(REPO / folder)
            os.utime(copy, ns=(source.stat().st_atime_ns, source.stat().st_mtime_ns))
            (copy.parent / "__pycache__").mkdir(exist_ok=True)
            for compiled in (source.parent / "__pycache__").glob(f"{source.stem}.*.nb*"):
                shutil.copy2(compiled, copy.parent / "__pycache__")


def clean_environment(home):
    kept = {name: os.environ[name] for name in os.environ if name not in CHECKOUT_VARIABLES}
    kept.pop("XDG_CACHE_HOME", None)
    return {**kept, "HOME": str(home)}


def test_it_holds_the_source_tree(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    files = {
        path.relative_to(REPO / folder).as_posix()
        for package, folder in ROOTS.items()
        for path in (REPO / folder / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert names == files
    assert {f"{package}/py.typed" for package in ROOTS} <= names
    assert "sglang_ess/sim/data/gpus/h200.toml" in names
    assert "ess_kernels/csrc/plan_fetch.cu" in names


def test_its_packages_are_the_ones_that_run(installed, tmp_path):
    code = "import sglang_ess as a, ess_kernels as b, ess_patches as c; print(a.__version__)"
    code += "; [print(module.__file__) for module in (a, b, c)]"
    lines = run([installed / "python", "-c", code], cwd=tmp_path, env=clean_environment(tmp_path))
    version, *files = lines.splitlines()
    packages = site_packages(installed.parent)
    assert [Path(file).parent.parent for file in files] == [packages] * 3
    assert (packages / f"sglang_ess-{version}.dist-info").is_dir()


def test_an_editable_install_has_the_three_roots():
    code = "import sglang_ess as a, ess_kernels as b, ess_patches as c"
    code += "; [print(module.__file__) for module in (a, b, c)]"
    environment = {name: os.environ[name] for name in os.environ if name != "PYTHONPATH"}
    files = run([sys.executable, "-P", "-c", code], env=environment).splitlines()
    assert [Path(file).parent.relative_to(Path(file).parents[2]).as_posix() for file in files] == [
        f"{folder}/{package}" for package, folder in ROOTS.items()
    ]


@pytest.mark.slow
def test_doctor_outside_the_checkout(installed, tmp_path):
    """As the documentation has it; tests/launch/test_doctor.py has --json."""
    command = [installed / "sglang-ess", "doctor"]
    out = run(command, cwd=tmp_path, env=clean_environment(tmp_path))
    (rows,) = re.findall(r"^contract \((\d+) rows\)", out, re.M)
    assert int(rows) == len(all_hooks()) and out.endswith("no problems\n")


def test_plan_outside_the_checkout(installed, tmp_path):
    command = [installed / "sglang-ess", "plan", "--model", "deepseek-v3.2", "--gpu", "h200"]
    command += ["--context", "4096", "--itl-ms", "50", "--requests", "4", "--json", "plan.json"]
    shown = run(command, cwd=tmp_path, env=clean_environment(tmp_path))
    assert "python -m sglang_ess.launch_server ... --disable-ess" in shown
    assert json.loads((tmp_path / "plan.json").read_text())


def test_numba_caches_elsewhere_if_the_packages_are_read_only(installed, tmp_path):
    """A file named __pycache__ stops even root. The module compiles at its import."""
    copy, packages = tmp_path / "packages", site_packages(installed.parent)
    shutil.copytree(packages, copy, ignore=shutil.ignore_patterns("__pycache__", "*.pth"))
    (copy / "sglang_ess" / "trace" / "__pycache__").touch()
    environment = {**clean_environment(tmp_path), "PYTHONPATH": str(copy)}
    code = "from sglang_ess.trace import codec; print(codec.__file__)"
    shown = run([installed / "python", "-c", code], cwd=tmp_path, env=environment)
    assert Path(shown.strip()).is_relative_to(copy)
    assert [*tmp_path.glob(".cache/numba/**/codec.*.nbi")]


class InstalledServer(HttpProcess):
    """`sglang-ess serve` of an environment, started in another directory."""

    def __init__(self, binaries, model, folder):
        self.binaries, self.folder = binaries, folder
        flags = ("--model-path", str(model), "--max-total-tokens", "20000")
        super().__init__("serve", *flags, log=folder / "server.log")

    def begin(self, output):
        return subprocess.Popen(
            [self.binaries / "sglang-ess", *self.command[2:]],
            cwd=self.folder,
            env=clean_environment(self.folder),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


@pytest.mark.slow
def test_serve_outside_the_checkout(installed, tmp_path):
    tiny = [installed / "python", "-m", "sglang_ess.tiny_model", "--out", "tiny"]
    run(tiny, cwd=tmp_path, env=clean_environment(tmp_path))
    with InstalledServer(installed, tmp_path / "tiny", tmp_path) as server:
        server.wait_ready()
        status, text = server.post(
            "/v1/completions", {"model": "tiny", "prompt": "Hello", "max_tokens": 4}
        )
    assert status == 200 and json.loads(text)["usage"]["completion_tokens"] == 4
    assert "sglang-ess" in server.log.read_text()

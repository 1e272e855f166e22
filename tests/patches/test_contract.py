"""The contract holds on the pinned SGLang, and a broken contract stops a process."""

import functools
import importlib.metadata
import inspect
import logging
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from ess_patches import all_hooks, contract, hooks, touch_points, touch_points_cuda, transfers
from ess_patches.contract import Hook, Mismatch, check, check_hook, signature_text
from sglang_ess import plugin
from sglang_ess.config import ENV_VAR, EssConfig
from sglang_ess.launch import doctor

REPO = Path(__file__).resolve().parents[2]


def hook(target, signature, kind="around", **more):
    return Hook(target, kind, signature, "os.path:join", "a test", **more)


@pytest.fixture
def upstream(monkeypatch):
    """A module `fake_upstream` that stands for one of SGLang's."""
    module = types.ModuleType("fake_upstream")

    def plan(a: int, b: "str" = "x", *rest, flag=False, **more) -> int:
        return 0

    @functools.wraps(plan)
    def wrapped(*args, **kwargs):
        return plan(*args, **kwargs)

    class Pool:
        def __init__(self, size: int, marker=plan):
            pass

        @classmethod
        def make(cls, size):
            pass

    module.plan, module.wrapped, module.Pool, module.TABLE = plan, wrapped, Pool, {}
    monkeypatch.setitem(sys.modules, "fake_upstream", module)
    return module


def test_the_contract_holds_on_the_installed_sglang():
    assert check(all_hooks() + transfers.TOUCHED) == []


def test_no_more_targets_than_have_a_reason():
    assert contract.target_count(all_hooks()) <= contract.MAX_TARGETS == 27


def test_every_row_says_why_and_names_one_existing_test():
    for row in all_hooks():
        assert row.reason.endswith("."), row.target
        assert row.test.split("::")[0].startswith("tests/"), row.target
        assert (REPO / row.test.split("::")[0]).is_file(), row.target


def test_the_hooks_are_one_sorted_table_and_no_target_is_in_it_twice():
    targets = [row.target for row in hooks.HOOKS]
    assert targets == sorted(set(targets))
    assert all(row.is_registered for row in hooks.HOOKS)
    for rows in (touch_points.HOOKS, touch_points_cuda.HOOKS, transfers.TOUCHED):
        assert not any(row.is_registered for row in rows)


def test_every_body_exists_and_takes_the_original_first():
    """Bodies are imported only at registration; this test finds a missing one earlier."""
    for row in all_hooks():
        if not row.is_registered:
            continue
        body = contract.pkgutil.resolve_name(row.body)
        assert callable(body), row.target
        if row.kind == "around":
            names = list(inspect.signature(body).parameters.values())
            assert names[0].kind in (names[0].POSITIONAL_ONLY, names[0].POSITIONAL_OR_KEYWORD)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("plan", "(a, b='x', *rest, flag=False, **more)"),
        ("wrapped", "(a, b='x', *rest, flag=False, **more)"),
        ("Pool", "(self, size, marker=<function upstream.<locals>.plan>)"),
        ("Pool.make", "(size)"),
        ("TABLE", "<dict>"),
    ],
)
def test_signature_text(upstream, name, text):
    assert signature_text(f"fake_upstream.{name}") == text


def test_a_hook_already_applied_is_seen_through(upstream):
    before = signature_text("fake_upstream.plan")
    from sglang.srt.plugins.hook_registry import HookType, _wrap_fn

    upstream.plan = _wrap_fn(upstream.plan, lambda original, *a, **k: 1, HookType.AROUND)
    assert upstream.plan(1) == 1
    assert signature_text("fake_upstream.plan") == before


@pytest.mark.parametrize(
    ("name", "signature", "kind", "state", "found"),
    [
        ("plan", "(a, b='x', *rest, flag=False)", "around", "changed", "**more"),
        ("plan", "(a, b='y', *rest, flag=False, **more)", "call", "changed", "b='x'"),
        ("gone", "(a)", "around", "missing", "AttributeError"),
        ("Pool.gone", "(a)", "call", "missing", "AttributeError"),
        ("Pool", "(self, size)", "subclass", "changed", "marker"),
        ("Pool", "(self, size, marker=<function upstream.<locals>.plan>)", "after", "changed",
         "a class"),
    ],
)  # fmt: skip
def test_mismatches(upstream, name, signature, kind, state, found):
    mismatch = check_hook(hook(f"fake_upstream.{name}", signature, kind))
    assert mismatch.state == state
    line = str(mismatch)
    assert "\n" not in line
    assert f"fake_upstream.{name}" in line and found in line and "sglang==0.5.23" in line


BROKEN = {  # source of a module that fails to import: what the operator reads
    "raise OSError('libcuda.so.1: cannot\\nopen')": "OSError: libcuda.so.1: cannot open",
    "import package_that_is_not_there": "No module named 'package_that_is_not_there'",
    "raise PermissionError(13, 'Permission denied', '/home/me/.triton')": "'/home/me/.triton'",
    "raise OSError(28, 'No space left on device')": "[Errno 28] No space left on device",
    "try:\n    raise RuntimeError('cannot cache function: no locator available')\n"
    "except Exception as error:\n    raise ImportError('see above') from error": "no locator",
    "from os import name_that_is_not_there": "cannot import name 'name_that_is_not_there'",
    "None.attribute": "AttributeError: 'NoneType' object has no attribute",
}


@pytest.fixture(params=BROKEN)
def broken(request, tmp_path, monkeypatch):
    """What an operator reads about broken_module.py, which 20 hooked names need."""
    (tmp_path / "broken_module.py").write_text(request.param)
    (tmp_path / "user_of_it.py").write_text("import broken_module")
    monkeypatch.syspath_prepend(tmp_path)
    rows = tuple(hook(f"user_of_it.f{i}", "()", when="cpu") for i in range(20))
    monkeypatch.setattr("ess_patches.all_hooks", lambda: rows)
    return BROKEN[request.param]


def test_an_import_that_fails_is_told_once_with_its_reason(broken, monkeypatch, capsys):
    monkeypatch.setattr(plugin, "registered", False)
    monkeypatch.setenv(ENV_VAR, EssConfig(platform="cpu").to_env()[ENV_VAR])
    with pytest.raises(SystemExit) as caught:
        plugin.register()
    (line,) = capsys.readouterr().err.splitlines()
    assert caught.value.code == 1 and not plugin.registered
    assert line.startswith("sglang-ess: user_of_it.f0 must be importable: got ") and broken in line
    assert "broken_module.py:" in line and "reinstall" not in line


def test_the_doctor_tells_it_once_too(broken):
    rows, problems = doctor.contract_rows("cpu")
    assert len(rows) == 20 and {row["state"] for row in rows} == {contract.BROKEN}
    (problem,) = problems
    assert broken in problem and "reinstall" not in problem


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("", "package.gone.f"),
        ("", "package.gone"),
        ("import package.gone", "package.inner.f"),
        ("from package import gone", "package.inner.f"),
        ("", "package_that_is_not_there.f"),
    ],
)
def test_a_name_that_the_package_itself_lacks_is_missing(tmp_path, monkeypatch, source, target):
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text("")
    (tmp_path / "package" / "inner.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    mismatch = check_hook(hook(target, "()"))
    assert mismatch.state == "missing" and "--force-reinstall" in str(mismatch)
    for name in [name for name in sys.modules if name.split(".")[0] == "package"]:
        del sys.modules[name]


def test_a_body_that_fails_to_import_is_told_in_one_line(tmp_path, monkeypatch):
    (tmp_path / "body_of_ours.py").write_text("raise OSError(28, 'No space left on device')")
    monkeypatch.syspath_prepend(tmp_path)
    row = Hook("os.path.join", "around", signature_text("os.path.join"), "body_of_ours:f", "r.")
    monkeypatch.setattr("ess_patches.all_hooks", lambda: (row,))
    monkeypatch.setattr(plugin, "registered", False)
    monkeypatch.setenv(ENV_VAR, EssConfig(platform="cpu").to_env()[ENV_VAR])
    with pytest.raises(SystemExit, match=r"^sglang-ess: hooks must register: .*body_of_ours.py:1"):
        plugin.register()


def test_a_wrong_version_comes_first(monkeypatch, upstream):
    real = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "0.5.24" if name == "sglang" else real(name)
    )
    found = check([hook("fake_upstream.gone", "()")])
    assert found[0] == Mismatch("sglang", "version", "0.5.23", "0.5.24")
    assert [m.target for m in found] == ["sglang", "fake_upstream.gone"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "wrap"}, "kind must be one of"),
        ({"when": "gpu"}, "when must be one of"),
        ({"body": "os.path.join"}, "body must be 'module:function'"),
    ],
)
def test_a_row_outside_the_rules_is_refused(change, message):
    row = {"target": "a.b", "kind": "around", "signature": "()", "body": "m:f", "reason": "r."}
    with pytest.raises(ValueError, match=message):
        Hook(**{**row, **change})


@pytest.fixture
def registry(monkeypatch):
    from sglang.srt.plugins.hook_registry import HookRegistry

    calls = []
    monkeypatch.setattr(HookRegistry, "register", lambda *call: calls.append(call))
    monkeypatch.setenv(plugin.APP_VAR, "")  # plugin.register() sets it, unless it is set
    return calls


def test_register_takes_the_rows_of_the_platform(registry):
    from sglang.srt.plugins.hook_registry import HookType

    rows = [
        hook("u.always", "()"),
        hook("u.cpu", "()", "after", when="cpu"),
        hook("u.cuda", "()", when="cuda"),
        hook("u.both", "()", when="both"),
        hook("u.touched", "()", "call"),
    ]
    assert contract.register(rows, "cpu") == ["u.always", "u.cpu", "u.both"]
    assert registry == [
        ("u.always", os.path.join, HookType.AROUND),
        ("u.cpu", os.path.join, HookType.AFTER),
        ("u.both", os.path.join, HookType.AROUND),
    ]
    assert contract.register(rows, "cuda") == ["u.always", "u.cuda", "u.both"]
    assert contract.register(rows, "xpu") == ["u.always"]


def test_a_missing_body_registers_nothing(registry):
    bad = Hook("u.b", "around", "()", "os.path:gone", "a test")
    with pytest.raises(AttributeError):
        contract.register([hook("u.a", "()"), bad], "cpu")
    assert registry == []


def test_the_plugin_is_inert_when_not_asked_for(monkeypatch, caplog, registry):
    monkeypatch.delenv(ENV_VAR, raising=False)
    monkeypatch.setattr(plugin, "registered", False)
    monkeypatch.setattr("ess_patches.all_hooks", lambda: (hook("sglang.gone", "()"),))
    with caplog.at_level(logging.INFO, logger="sglang_ess.plugin"):
        plugin.register()
    assert [record.message for record in caplog.records] == [
        f"sglang-ess: inert, {ENV_VAR} is not set"
    ]
    assert not plugin.registered and registry == []


@pytest.mark.parametrize(
    ("enabled", "targets"), [(True, ["u.a", "u.c", "u.b"]), (False, ["u.c", "u.b"])]
)
def test_one_tier_keeps_the_cpu_platforms_rows_only(monkeypatch, registry, enabled, targets):
    rows = (
        hook("u.a", "()"),
        hook("u.c", "()", when="cpu"),
        hook("u.b", "()", when="both"),
        hook("u.g", "()", when="cuda"),
    )
    assert not any(row.applies("cuda", two_tiers=False) for row in rows)
    monkeypatch.setattr("ess_patches.all_hooks", lambda: rows)
    monkeypatch.setattr(contract, "check", lambda hooks: [])
    monkeypatch.setattr(plugin, "registered", False)
    monkeypatch.setenv(ENV_VAR, EssConfig(enabled, "cpu").to_env()[ENV_VAR])
    plugin.register()
    assert plugin.registered and [call[0] for call in registry] == targets


def test_the_platforms_name_alone_brings_one_tier_with_its_rows(monkeypatch, registry):
    rows = (hook("u.a", "()"), hook("u.c", "()", when="cpu"))
    monkeypatch.setattr("ess_patches.all_hooks", lambda: rows)
    monkeypatch.setattr(contract, "check", lambda hooks: [])
    monkeypatch.setattr(plugin, "registered", False)
    monkeypatch.delenv(ENV_VAR, raising=False)
    monkeypatch.setenv("SGLANG_PLATFORM", "ess_cpu")
    plugin.register()
    assert plugin.registered and [call[0] for call in registry] == ["u.c"]


@pytest.mark.parametrize("value", ["{", '{"platform": "gpu"}'])
@pytest.mark.parametrize("entry_point", [plugin.register, plugin.activate_cpu_platform])
def test_a_bad_variable_stops_the_process(monkeypatch, value, entry_point):
    monkeypatch.setenv(ENV_VAR, value)
    with pytest.raises(SystemExit, match=r"^sglang-ess: [^\n]*$"):
        entry_point()


def test_any_failure_to_register_stops_the_process(monkeypatch):
    bad = Hook("os.path.join", "around", signature_text("os.path.join"), "nowhere:f", "a test")
    monkeypatch.setattr("ess_patches.all_hooks", lambda: (bad,))
    monkeypatch.setattr(plugin, "registered", False)
    monkeypatch.setenv(ENV_VAR, EssConfig(platform="cpu").to_env()[ENV_VAR])
    with pytest.raises(SystemExit, match="No module named 'nowhere'"):
        plugin.register()
    assert not plugin.registered


@pytest.mark.parametrize(
    ("config", "sglang_platform", "accelerator", "taken"),
    [
        (None, None, None, False),
        (None, "ess_cpu", None, True),
        (None, "ess_cpu", "cuda", True),
        ("auto", None, None, True),
        ("auto", None, "cuda", False),
        ("auto", "ess_cpu", "cuda", True),
        ("cpu", None, "cuda", True),
        ("native", None, None, False),
        ("native", "ess_cpu", None, False),
    ],
)
def test_when_the_cpu_platform_is_taken(monkeypatch, config, sglang_platform, accelerator, taken):
    for name, value in (
        (ENV_VAR, config and EssConfig(platform=config).to_env()[ENV_VAR]),
        ("SGLANG_PLATFORM", sglang_platform),
    ):
        monkeypatch.delenv(name, raising=False)
        if value:
            monkeypatch.setenv(name, value)
    monkeypatch.setattr(plugin, "accelerator", lambda: accelerator)
    assert plugin.activate_cpu_platform() == (plugin.CPU_PLATFORM if taken else None)
    assert plugin.active_platform() == ("cpu" if taken else accelerator or "none")


def test_a_broken_contract_stops_the_process(tmp_path):
    """A sitecustomize breaks version and signature: production code has no switch for it."""
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.metadata as m; real = m.version\n"
        "m.version = lambda name: '0.5.22' if name == 'sglang' else real(name)\n"
        "import ess_patches; from ess_patches.contract import Hook\n"
        "row = 'sglang.srt.plugins.load_plugins', 'around', '(nope)', 'os:getcwd', 'r.'\n"
        # Without the other rows, which would be imported: all are checked above and by the doctor.
        "ess_patches.all_hooks = lambda: (Hook(*row),)"
    )
    done = subprocess.run(
        [sys.executable, "-c", "from sglang.srt.plugins import load_plugins; load_plugins()"],
        env={**os.environ, "PYTHONPATH": str(tmp_path), **EssConfig(platform="native").to_env()},
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [line for line in done.stderr.splitlines() if line.startswith("sglang-ess: ")]
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert lines[0].startswith(
        "sglang-ess: sglang must be as in SGLang 0.5.23 (version): got 0.5.22, expected 0.5.23."
    )
    assert lines[1].startswith(
        "sglang-ess: sglang.srt.plugins.load_plugins must be as in SGLang 0.5.23 (changed): "
        "got (), expected (nope)."
    )
    assert "broken at sglang, sglang.srt.plugins.load_plugins" in lines[2]

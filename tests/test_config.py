"""EssConfig: one record, through the command line and through one environment variable."""

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass, fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_ess.config import ENV_VAR, EssConfig, _option

CONFIGS = st.builds(
    EssConfig,
    enabled=st.booleans(),
    platform=st.sampled_from(("auto", "cpu", "native")),
    index_dtype=st.sampled_from(("fp8", "float32")),
)


def parse(cls, argv):
    parser = argparse.ArgumentParser()
    cls.add_cli_args(parser)
    return cls.from_cli_args(parser.parse_args(argv))


def refusal(text):
    with pytest.raises(ValueError) as caught:
        EssConfig.from_env({ENV_VAR: text})
    line = str(caught.value)
    assert "\n" not in line
    return line


@given(CONFIGS)
def test_environment_round_trip(config):
    environ = config.to_env()
    assert set(environ) == {ENV_VAR}
    assert EssConfig.from_env(environ) == config


@given(CONFIGS)
def test_command_line_round_trip(config):
    argv = ["--ess-platform", config.platform, "--ess-index-dtype", config.index_dtype]
    assert parse(EssConfig, argv + ["--disable-ess"] * (not config.enabled)) == config


VALUES = st.none() | st.booleans() | st.integers() | st.text()
KEYS = st.sampled_from(("enabled", "platform", "index_dtype")) | st.text()


@given(st.text() | (VALUES | st.lists(VALUES) | st.dictionaries(KEYS, VALUES)).map(json.dumps))
def test_any_text_is_a_config_or_one_line(text):
    try:
        assert isinstance(EssConfig.from_env({ENV_VAR: text}), EssConfig)
    except ValueError:
        assert any(word in refusal(text) for word in ("enabled, platform", "--"))


def test_unset_is_none_and_defaults_are_the_flags_defaults():
    assert EssConfig.from_env({}) is None
    assert EssConfig.from_env({ENV_VAR: "{}"}) == EssConfig() == parse(EssConfig, [])


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("", ["must be JSON", "enabled, platform, index_dtype"]),
        ("[1]", ["must be a JSON object", "enabled, platform, index_dtype"]),
        ('{"plattform": "cpu"}', ["plattform", "enabled, platform, index_dtype"]),
        ('{"platform": "gpu"}', ["--ess-platform", "auto, cpu, native", "'gpu'"]),
        ('{"enabled": 1}', ["--disable-ess", "a bool", "got 1"]),
        ('{"index_dtype": null}', ["--ess-index-dtype", "fp8, float32", "None"]),
        ('{"platform": 1, "index_dtype": "x", "y": 0}', ["got ['y']", "got 1", "got 'x'"]),
    ],
)
def test_refusals_hold_every_reason_and_the_valid_values(text, names):
    line = refusal(text)
    assert [name for name in names if name not in line] == []


def test_the_constructor_checks_too():
    with pytest.raises(ValueError, match="auto, cpu, native"):
        EssConfig(platform="gpu")


def test_a_later_option_needs_one_place_only():
    @dataclass(frozen=True)
    class Later(EssConfig):
        hot_rows: int = _option(4096, "--ess-hot-rows", "Hot rows a layer.")
        canary: bool = _option(False, "--ess-canary", "Check rows.")

    assert Later.flags()[-2:] == ("--ess-hot-rows", "--ess-canary")
    config = parse(Later, ["--ess-hot-rows", "8", "--ess-canary"])
    assert (config.hot_rows, config.canary) == (8, True)
    assert Later.from_env(config.to_env()) == config
    with pytest.raises(ValueError, match="--ess-hot-rows.* must be a int: got '8'"):
        Later(hot_rows="8")


def test_every_flag_has_a_help_text_in_one_group():
    parser = argparse.ArgumentParser()
    EssConfig.add_cli_args(parser)
    text = parser.format_help()
    assert "ESS (sglang-ess):" in text
    assert all(flag in text for flag in EssConfig.flags())
    assert all(len(f.metadata["help"]) > 20 for f in fields(EssConfig))


def test_import_is_light():
    code = (
        "import sys, sglang_ess.config, sglang_ess.plugin, sglang_ess.launch_server;"
        "print([m for m in ('torch', 'sglang', 'numpy', 'yaml') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"

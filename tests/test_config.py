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

SHARES = st.floats(0, 1, exclude_min=True)
SIZES = st.floats(0, 1e6, exclude_min=True) | st.integers(1, 1000)
# One of the two ways to size the hot tier, or none.
HOT = st.just({}) | SHARES.map(lambda x: {"hot_ratio": x}) | SIZES.map(lambda x: {"hot_gib": x})
# Each needs the other.
STREAM = st.just({}) | st.text(min_size=1).map(lambda x: {"topk_stream": x, "unsafe": True})
TRACE = st.builds(
    lambda file, scores: {"trace": file, "trace_scores": scores if file else 0},
    st.text(),
    st.integers(0, 65536),
)
CONFIGS = st.builds(
    lambda hot, stream, **rest: EssConfig(**hot, **stream, **rest),
    HOT,
    STREAM | TRACE,
    enabled=st.booleans(),
    platform=st.sampled_from(("auto", "cpu", "native")),
    index_dtype=st.sampled_from(("fp8", "float32")),
    host_gib=st.none() | SIZES,
    device_gib=st.none() | SIZES,
    warmup=st.sampled_from(("on", "off")),
    canary_rate=st.floats(0, 1),
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
    given_values = {f.metadata["flag"]: getattr(config, f.name) for f in fields(EssConfig)}
    switches = ["--disable-ess"] * (not given_values.pop("--disable-ess"))
    switches += ["--ess-unsafe"] * given_values.pop("--ess-unsafe")
    argv = [f"{flag}={value}" for flag, value in given_values.items() if value is not None]
    assert parse(EssConfig, argv + switches) == config


VALUES = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
KEYS = st.sampled_from(tuple(f.name for f in fields(EssConfig))) | st.text()


@given(st.text() | (VALUES | st.lists(VALUES) | st.dictionaries(KEYS, VALUES)).map(json.dumps))
def test_any_text_is_a_config_or_one_line(text):
    try:
        assert isinstance(EssConfig.from_env({ENV_VAR: text}), EssConfig)
    except ValueError:
        assert any(word in refusal(text) for word in ("enabled, platform", "--"))


def test_unset_is_none_and_defaults_are_the_flags_defaults():
    assert EssConfig.from_env({}) is None
    assert EssConfig.from_env({ENV_VAR: "{}"}) == EssConfig() == parse(EssConfig, [])
    automatic = (
        "hot_ratio", "hot_gib", "host_gib", "device_gib", "link_gib", "itl_ms", "layer_budgets",
    )  # fmt: skip
    assert [f.name for f in fields(EssConfig) if f.default is None] == list(automatic)
    assert all(
        getattr(EssConfig.from_env(EssConfig().to_env()), name) is None for name in automatic
    )


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
        ('{"hot_ratio": 0}', ["--ess-hot-ratio", "more than 0 and at most 1", "got 0."]),
        ('{"hot_ratio": 1.01}', ["--ess-hot-ratio", "at most 1", "got 1.01"]),
        ('{"hot_ratio": "0.2"}', ["--ess-hot-ratio", "a float", "got '0.2'"]),
        ('{"hot_ratio": true}', ["--ess-hot-ratio", "a float", "got True"]),
        ('{"hot_ratio": NaN}', ["--ess-hot-ratio", "got nan"]),
        ('{"hot_gib": 0}', ["--ess-hot-gib", "more than 0"]),
        ('{"host_gib": -1}', ["--ess-host-gib", "more than 0", "got -1"]),
        ('{"device_gib": Infinity}', ["--ess-device-gib", "more than 0", "got inf"]),
        ('{"canary_rate": 1.5}', ["--ess-canary-rate", "0 to 1", "got 1.5"]),
        ('{"canary_rate": -0.1}', ["--ess-canary-rate", "0 to 1"]),
        ('{"canary_rate": null}', ["--ess-canary-rate", "got None"]),
        ('{"warmup": true}', ["--ess-warmup", "on, off", "got True"]),
        ('{"trace": null}', ["--ess-trace", "a str", "got None"]),
        ('{"trace": "t", "trace_scores": -1}', ["--ess-trace-scores", "0 to 65536", "got -1"]),
        ('{"trace": "t", "trace_scores": 2.0}', ["--ess-trace-scores", "an int", "got 2.0"]),
        ('{"trace_scores": 8}', ["must come with --ess-trace: got 8. Drop it or name a file."]),
        (
            '{"trace": "t", "trace_scores": 8, "topk_stream": "x", "unsafe": true}',
            ["--ess-trace-scores must not come with --ess-topk-stream", "got 8. Drop it."],
        ),
        ('{"hot_ratio": 0.5, "hot_gib": 2}', ["must not both", "got 0.5 and 2 GiB"]),
        ('{"hot_ratio": 9, "hot_gib": -2}', ["got 9", "got -2"]),
        ('{"topk_stream": "x"}', ["must come with --ess-unsafe", "got 'x' without", "wrong"]),
        ('{"topk_stream": "x", "unsafe": 1}', ["--ess-unsafe", "a bool", "got 1"]),
        ('{"unsafe": true}', ["--ess-topk-stream", "got it alone"]),
    ],
)
def test_refusals_hold_every_reason_and_the_valid_values(text, names):
    line = refusal(text)
    assert [name for name in names if name not in line] == []


def test_the_constructor_checks_too():
    with pytest.raises(ValueError, match="auto, cpu, native"):
        EssConfig(platform="gpu")


@pytest.mark.parametrize(
    ("flag", "value"),
    [("--ess-hot-ratio", "half"), ("--ess-hot-gib", ""), ("--ess-canary-rate", "1%")],
)
def test_a_value_that_is_no_number(capsys, flag, value):
    with pytest.raises(SystemExit):
        parse(EssConfig, [flag, value])
    assert flag in capsys.readouterr().err


def test_the_limits_themselves():
    assert EssConfig(hot_ratio=5e-324).hot_ratio > 0
    config = EssConfig(hot_ratio=1)  # a whole number is a float, here and after the round trip
    assert config == EssConfig(hot_ratio=1.0) == EssConfig.from_env(config.to_env())
    assert EssConfig(canary_rate=0).canary_rate == 0 and EssConfig(canary_rate=1).canary_rate == 1


def test_automatic_is_said_in_the_help():
    parser = argparse.ArgumentParser()
    EssConfig.add_cli_args(parser)
    assert " ".join(parser.format_help().split()).count("(default: automatic)") == 7


def test_a_later_option_needs_one_place_only():
    @dataclass(frozen=True)
    class Later(EssConfig):
        hot_rows: int = _option(4096, "--ess-hot-rows", "Hot rows a layer.")
        canary: bool = _option(False, "--ess-canary", "Check rows.")

    assert Later.flags()[-2:] == ("--ess-hot-rows", "--ess-canary")
    config = parse(Later, ["--ess-hot-rows", "8", "--ess-canary"])
    assert (config.hot_rows, config.canary) == (8, True)
    assert Later.from_env(config.to_env()) == config
    with pytest.raises(ValueError, match="--ess-hot-rows.* must be an int: got '8'"):
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

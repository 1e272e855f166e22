"""The launcher refuses models, platforms and features that two tiers do not serve."""

import json

import pytest

from sglang_ess.launch import option_ranges as ranges
from sglang_ess.launch import option_rules
from tests.support.launching import DSA, refused


@pytest.mark.parametrize(
    "change", [{"architectures": ["LlamaForCausalLM"]}, {"index_topk": None}, {"architectures": []}]
)
def test_models_without_sparse_attention(launch, change):
    model = {**DSA, **change}
    refused(launch(model=model), "sparse attention", "index_topk", "--disable-ess")
    assert launch("--disable-ess", model=model)[1] == []
    refused(launch(model={}), "architectures None")


def test_overrides_and_text_config_count(launch):
    override = json.dumps({"index_topk": 64})
    model = {**DSA, "index_topk": None}
    assert launch("--json-model-override-args", override, model=model)[1] == []
    nested = {"architectures": DSA["architectures"], "text_config": DSA}
    assert launch(model=nested)[1] == []
    refused(launch("--json-model-override-args", "{"), "--json-model-override-args must be JSON")


def test_hisparse(launch):
    refused(launch("--enable-hisparse"), "--enable-hisparse", "--disable-ess")
    refused(launch("--enable-hisparse", accelerator="cuda"), "--enable-hisparse", "--disable-ess")
    assert launch("--enable-hisparse", "--disable-ess", accelerator="cuda")[1] == []


@pytest.mark.parametrize(
    ("flag", "value", "limit"),
    [
        ("--device", "cuda", "unset or cpu"),
        ("--dcp-size", "2", "1"),
        ("--attn-cp-size", "2", "1"),
        ("--moe-dp-size", "2", "1"),
        ("--moe-a2a-backend", "pplx", "none"),
        ("--elastic-ep-backend", "mooncake", "unset or none"),
        ("--boundary-reduction", "rs", "auto or ar"),
        ("--enable-eplb", None, "off"),
        ("--ep-num-redundant-experts", "2", "0"),
        ("--base-gpu-id", "1", "0"),
        ("--gpu-id-step", "2", "1"),
        ("--quantization", "fp8", "unset or unquant"),
        ("--enable-hierarchical-cache", None, "off"),
        ("--enable-lora", None, "unset or off"),
        ("--enable-two-batch-overlap", None, "off"),
        ("--kv-cache-dtype", "fp8_e5m2", "auto or bf16 or bfloat16 or fp8_e4m3"),
        ("--page-size", "1", "unset or 64"),
        ("--attention-backend", "fa3", "unset or dsa or nsa"),
        ("--dtype", "half", "auto or bfloat16 or float32 or float"),
        ("--is-embedding", None, "off"),
    ],
)
def test_the_cpu_platforms_limits(launch, flag, value, limit):
    given = [flag] if value is None else [flag, value]
    got = "on" if value is None else value
    refused(launch(*given), f"{flag} must be {limit} on the CPU platform: got {got}.")
    rules = {rule[1] for rule in option_rules.ESS_RULES + option_rules.CUDA_RULES}
    lines = launch(*given, accelerator="cuda")[1]
    assert (" with ESS: got " in "".join(lines)) if flag in rules else lines == []
    assert launch(*given, "--disable-ess", accelerator="cuda")[1] == []


@pytest.mark.parametrize(
    "flags",
    [
        ["--kv-cache-dtype", "fp8_e4m3", "--page-size", "64", "--attention-backend", "dsa"],
        ["--disaggregation-mode", "decode"],
        ["--disaggregation-mode", "decode", "--disable-ess"],
        ["--disaggregation-mode", "prefill"],
        ["--ess-link-gib", "0.5", "--ess-itl-ms", "80", "--ess-admission", "off"],
        ["--ess-hot-ratio", "0.3", "--ess-host-gib", "0.5", "--ess-device-gib", "0.25"],
        ["--ess-device-gib", "0.25", "--disable-ess"],
        ["--tp-size", "2", "--ep-size", "2"],
        ["--tp-size", "4", "--dp-size", "2", "--enable-dp-attention"],
        ["--dp-size", "2"],
        ["--tp-size", "2", "--nnodes", "2", "--node-rank", "1"],
        ["--pp-size", "2", "--ess-admission", "off"],
        ["--pp-size", "2", "--disable-ess"],
    ],
)
def test_what_the_cpu_platform_takes(launch, flags):
    assert launch(*flags)[1] == []


def test_stages_must_admit_the_same_requests(launch):
    refused(launch("--pp-size", "2"), "--ess-admission must be off with --pp-size 2: got on")


def test_each_rank_must_have_cores(launch, monkeypatch):
    monkeypatch.setenv("SGLANG_CPU_OMP_THREADS_BIND", "0-3|4-7")
    assert launch("--tp-size", "2")[1] == []
    refused(launch("--dp-size", "4"), "each of 4 ranks", "'0-3|4-7'")


def test_dense_models_keep_sglangs_own_choices_on_the_cpu_platform(launch):
    flags = ("--page-size", "1", "--attention-backend", "torch_native", "--disable-ess")
    assert launch(*flags, model={"architectures": ["LlamaForCausalLM"]})[1] == []


def test_a_quantized_checkpoint_on_the_cpu_platform(launch):
    model = {**DSA, "quantization_config": {"quant_method": "fp8"}}
    refused(launch(model=model), "quant_method 'fp8'", "bfloat16 checkpoint")
    assert launch(model=model, accelerator="cuda")[1] == []


def test_the_fp8_row_has_one_shape(launch):
    """On the CPU platform every row has: test_launch_architectures.py."""
    model = {**DSA, "kv_lora_rank": 128, "qk_rope_head_dim": 32}
    result = launch("--kv-cache-dtype", "fp8_e4m3", model=model, accelerator="cuda")
    refused(result, "656-byte row", "got 128 and 32")
    assert launch(model=model, accelerator="cuda")[1] == []


GLM5_NEXT = {
    **DSA, "architectures": ["Glm5NextForConditionalGeneration"], "qk_rope_head_dim": 0,
    "index_kpool": 4, "linear_attn_config": {"kda_layers": [0]},
}  # fmt: skip


def test_pooled_keys_and_linear_layers(launch):
    flags = ("--kv-cache-dtype", "fp8_e4m3")
    assert launch(*flags, model=GLM5_NEXT)[1] == []
    refused(launch(*flags, model=GLM5_NEXT, accelerator="cuda"), "index_kpool 4", "--disable-ess")
    assert launch("--disable-ess", model=GLM5_NEXT, accelerator="cuda")[1] == []
    refused(launch("--disaggregation-mode", "decode", model=GLM5_NEXT), "linear", "got decode")
    apart = launch("--tp-size", "2", "--dp-size", "2", "--enable-dp-attention", model=GLM5_NEXT)
    refused(apart, "--enable-dp-attention must be off", "linear")


def test_float32_indexer_keys_off_the_cpu_platform(launch):
    flags = ("--ess-index-dtype", "float32")
    refused(launch(*flags, accelerator="cuda"), "--ess-index-dtype must be fp8", "float32")
    assert launch(*flags, "--ess-platform", "cpu", accelerator="cuda")[1] == []


def test_rows_do_not_move_between_the_layers_of_a_gpu(launch):
    flags = ("--ess-layer-budgets", "auto")
    lines = "--ess-layer-budgets must be uniform or left out", "got auto. Drop it"
    refused(launch(*flags, accelerator="cuda"), *lines)
    assert launch(*flags)[1] == launch(*flags, "--ess-platform", "cpu", accelerator="cuda")[1] == []
    assert launch("--ess-layer-budgets", "uniform", accelerator="cuda")[1] == []


RULE_CASES = {
    "disaggregation_transfer_backend": ["--disaggregation-transfer-backend", "mori"],
    "disaggregation_decode_enable_offload_kvcache": [
        "--disaggregation-decode-enable-offload-kvcache"
    ],
    "disaggregation_decode_host_receive_threshold": [
        "--disaggregation-decode-host-receive-threshold",
        "0.5",
    ],
    "disaggregation_decode_retraction_backup": [
        "--disaggregation-decode-retraction-backup",
        "host_pool",
    ],
    "enable_pd_role_switch": ["--enable-pd-role-switch"],
    "enable_memory_saver": ["--enable-memory-saver"],
    "enable_unified_memory": ["--enable-unified-memory"],
    "enable_hisparse": ["--enable-hisparse"],
    "enable_hierarchical_cache": ["--enable-hierarchical-cache"],
    "enable_lmcache": ["--enable-lmcache"],
    "enable_flexkv": ["--enable-flexkv"],
    "pp_size": ["--pp-size", "2"],
    "dcp_size": ["--dcp-size", "2"],
    "attn_cp_size": ["--attn-cp-size", "2"],
    "enable_two_batch_overlap": ["--enable-two-batch-overlap"],
    "enable_single_batch_overlap": ["--enable-single-batch-overlap"],
    "enable_pdmux": ["--enable-pdmux"],
    "enable_mixed_chunk": ["--enable-mixed-chunk"],
    "moe_a2a_backend": ["--moe-a2a-backend", "pplx"],
    "attention_backend": ["--attention-backend", "flashmla"],
    "prefill_attention_backend": ["--prefill-attention-backend", "fa3"],
    "decode_attention_backend": ["--decode-attention-backend", "flashmla"],
}


@pytest.mark.parametrize(("name", "flag", "allowed"), option_rules.ESS_RULES)
def test_what_two_tiers_do_not_serve(launch, name, flag, allowed):
    """The launcher prints one line for each, even if the CPU platform has a rule for it too."""
    given = RULE_CASES[name]
    assert given[0] == flag
    refused(launch(*given), f"{flag} must be ")
    ours = name not in {rule[0] for rule in option_rules.CPU_RULES} | {"enable_hisparse"}
    if ours:
        refused(launch(*given), " with ESS: got ", "Drop it or add --disable-ess")
    assert (launch(*given, "--disable-ess")[0] != 2) == ours
    refused(launch(*given, accelerator="cuda"), f"{flag} must be ")


@pytest.mark.parametrize(("name", "flag", "allowed"), option_rules.CUDA_RULES)
def test_what_two_tiers_do_not_serve_on_a_gpu(launch, name, flag, allowed):
    given = RULE_CASES[name]
    assert given[0] == flag
    refused(launch(*given, accelerator="cuda"), f"{flag} must be ", "with ESS", "add --disable-ess")
    assert launch(*given, "--disable-ess", accelerator="cuda")[1] == []


MTP = {**DSA, "num_nextn_predict_layers": 1}
NGRAM = ["--speculative-algorithm", "NGRAM"]
CHAIN = [*NGRAM, "--speculative-ngram-max-bfs-breadth", "1"]


@pytest.mark.parametrize("gpu", [{}, {"accelerator": "cuda"}], ids=["cpu", "cuda"])
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], ""),
        (["--speculative-num-steps", "3", "--speculative-eagle-topk", "1"], ""),
        (["--speculative-eagle-topk", "4"], "--speculative-eagle-topk must be unset or 1"),
        (["--speculative-adaptive"], "--speculative-adaptive must be off"),
        (["--enable-multi-layer-eagle"], "--enable-multi-layer-eagle must be off"),
    ],
)
@pytest.mark.parametrize("algorithm", ["EAGLE", "nextn"])
def test_chains_of_drafts_are_served(launch, algorithm, flags, words, gpu):
    given = ["--speculative-algorithm", algorithm, *flags]
    result = launch(*given, model=MTP, **gpu)
    refused(result, words) if words else result[1] == []
    if gpu:
        assert launch(*given, "--disable-ess", model=MTP, **gpu)[1] == []


@pytest.mark.parametrize("gpu", [{}, {"accelerator": "cuda"}], ids=["cpu", "cuda"])
def test_other_speculation_is_refused(launch, gpu):
    for algorithm in ("EAGLE3", "DFLASH", "STANDALONE"):
        words = "--speculative-algorithm must be unset or EAGLE or NEXTN or NGRAM", algorithm
        refused(launch("--speculative-algorithm", algorithm, model=MTP, **gpu), *words)
    assert launch(*CHAIN, **gpu)[1] == []
    refused(launch(*NGRAM, **gpu), "--speculative-ngram-max-bfs-breadth must be 1", "got 10")
    apart = launch(*CHAIN, "--disaggregation-mode", "decode", **gpu)
    refused(apart, "--disaggregation-mode must be null with speculative decoding", "got decode")
    without = launch("--speculative-algorithm", "EAGLE", **gpu)
    refused(without, "must have a model with a draft layer", "num_nextn_predict_layers None")
    named = ["--speculative-algorithm", "EAGLE", "--speculative-draft-model-path", "org/draft"]
    assert launch(*named, **gpu)[1] == []


def test_speculation_that_the_cpu_platform_lacks(launch):
    eagle = ["--speculative-algorithm", "EAGLE"]
    sampling = [*eagle, "--speculative-use-rejection-sampling"]
    refused(launch(*sampling, model=MTP), "--speculative-use-rejection-sampling must be off")
    assert launch(*sampling, model=MTP, accelerator="cuda")[1] == []
    refused(launch(*CHAIN, model=GLM5_NEXT), "not all of DeepSeek sparse attention")
    dense = {"architectures": ["LlamaForCausalLM"]}
    refused(launch(*CHAIN, "--disable-ess", model=dense), "not all of DeepSeek sparse attention")


def test_ranks_that_are_padded_to_one_length(launch, monkeypatch):
    assert launch(accelerator="cuda")[1] == []
    monkeypatch.setenv("SGLANG_DEEPEP_V2_FORCE_MAX_LEN", "1")
    refused(launch(accelerator="cuda"), "SGLANG_DEEPEP_V2_FORCE_MAX_LEN must be off with ESS")
    assert launch("--disable-ess", accelerator="cuda")[1] == []


def test_flashinfer_attention(launch):
    flags = ("--ess-attention", "flashinfer")
    refused(launch(*flags), "--ess-attention must be left out", "CPU platform")
    refused(launch("--ess-attention", "fa4"), "--ess-attention", "sglang, flashinfer", "'fa4'")
    gpu = {"accelerator": "cuda"}
    for more in ((), ("--ess-overlap", "off"), ("--kv-cache-dtype", "bfloat16")):
        assert launch(*flags, *more, **gpu)[1] == []
    for mode in ("da", "dba"):
        refused(launch(*flags, "--ess-overlap", mode, **gpu), "--ess-overlap must be off", mode)
    refused(launch(*flags, *CHAIN, **gpu), "--speculative-algorithm must be unset with", "NGRAM")
    fp8 = ("--kv-cache-dtype", "fp8_e4m3")
    refused(launch(*flags, *fp8, **gpu), "must be bfloat16 with --ess-attention", "got fp8_e4m3")
    assert launch("--ess-attention", "sglang", *fp8, "--ess-overlap", "da", **gpu)[1] == []


def test_overlap_and_its_costs(launch, tmp_path):
    refused(launch("--ess-overlap", "da"), "--ess-overlap and", "CPU platform", "one stream")
    assert launch("--ess-overlap", "da", accelerator="cuda")[1] == []
    refused(launch("--ess-overlap", "on"), "--ess-overlap", "auto, off, da, dba", "'on'")
    costs = tmp_path / "kernels.json"
    flags = ("--ess-overlap-costs", str(costs))
    refused(launch(*flags, accelerator="cuda"), "must hold a cost table", "FileNotFoundError")
    costs.write_text("{}")
    refused(launch(*flags, accelerator="cuda"), "overlap_costs", "benchmarks.kernels")


def test_device_gib_off_the_cpu_platform(launch):
    flags = ("--ess-device-gib", "1.5")
    refused(
        launch(*flags, accelerator="cuda"), "--ess-device-gib", "got 1.5", "mem-fraction-static"
    )
    refused(launch(*flags, "--disable-ess", accelerator="cuda"), "--ess-device-gib must not")
    assert launch(*flags, "--ess-platform", "cpu", accelerator="cuda")[1] == []


@pytest.mark.parametrize(("name", "flag", "words", "holds"), ranges.RANGES)
def test_values_that_would_end_a_server(launch, name, flag, words, holds):
    outside = next(value for value in (0, -1, 1 << 40) if not holds(value))
    refused(launch(flag, str(outside)), f"{flag} must be {words}: got {outside}.")
    assert launch(flag, "1", "--disable-ess")[1] == []


@pytest.mark.parametrize(("name", "flag"), ranges.JSON)
def test_options_that_are_json(launch, name, flag):
    for text in ("{bad", "[]", "1"):
        refused(launch(flag, text), f"{flag} must be a JSON object: got '{text}'")
    assert launch(flag, "{}")[1] == []


def test_tracing_needs_its_package(launch, monkeypatch):
    monkeypatch.setattr(ranges.importlib.util, "find_spec", lambda name: None)
    refused(launch("--enable-trace"), "--enable-trace must have the package opentelemetry")
    monkeypatch.setattr(ranges.importlib.util, "find_spec", lambda name: name)
    assert launch("--enable-trace")[1] == []


def test_nodes_that_are_none(launch):
    refused(launch("--numa-node", "0", "-1"), "--numa-node must be 0 or more: got [0, -1]")
    refused(launch("--node-rank", "1", "--disable-ess"), "--node-rank must be below", "1 of 1")


def test_nan_is_no_value_of_any_flag(launch):
    refused(launch("--soft-watchdog-timeout", "nan"), "--soft-watchdog-timeout must be a number")


def test_a_host_tier_larger_than_memory(launch):
    refused(launch("--ess-host-gib", "1e6"), "--ess-host-gib must fit", "got 1e+06 GiB", "limit ")
    assert launch("--ess-host-gib", "1e6", "--disable-ess")[1] == []


def test_a_trace_that_could_not_be_written(launch, tmp_path):
    gone = str(tmp_path / "gone" / "trace.ess")
    refused(launch("--ess-trace", gone), "--ess-trace must name a file", repr(gone))
    refused(launch("--ess-trace", str(tmp_path)), "--ess-trace must name a file")
    assert launch("--ess-trace", str(tmp_path / "trace.ess"))[1] == []
    assert launch("--ess-trace", gone, "--disable-ess")[1] == []
    flags = ("--ess-trace", str(tmp_path / "trace.ess"))
    refused(launch(*flags, accelerator="cuda"), "--ess-trace must be left out", "--ess-platform")


def test_an_early_fetch_that_could_not_be(launch):
    flags, drafts = ("--ess-early-fetch", "8"), ("--speculative-algorithm", "EAGLE")
    assert launch(*flags, *drafts, model=MTP)[1] == []
    refused(launch(*flags, model=MTP), "must come with --speculative-algorithm: got 8 without")
    gpu = launch(*flags, *drafts, model=MTP, accelerator="cuda")
    refused(gpu, "--ess-early-fetch must be left out off the CPU platform: got 8", "fused top-k")
    assert launch(*flags, "--disable-ess", model=MTP)[1] == []


def test_scores_that_could_not_be_recorded(launch, tmp_path):
    scores = "--ess-trace-scores", "64"
    refused(launch(*scores), "--ess-trace-scores must come with --ess-trace: got 64")
    flags = ("--ess-trace", str(tmp_path / "trace.ess"), *scores)
    assert launch(*flags)[1] == []
    message = "--ess-trace-scores must be left out off the CPU platform: got 64", "fused top-k"
    refused(launch(*flags, accelerator="cuda"), *message)
    pooled = {**DSA, "index_kpool": 4}
    refused(launch(*flags, model=pooled), "--ess-trace-scores must be left out", "index_kpool 4")


def test_all_reasons_are_collected(launch):
    status, lines = launch(
        "--dcp-size", "2", "--enable-lora", "--enable-hisparse", "--page-size", "1",
        "--kv-cache-dtype", "fp8_e4m3", model={**DSA, "kv_lora_rank": 128},
    )  # fmt: skip
    assert status == 2
    named = [line.split()[1] for line in lines]
    assert named == [
        "--model-path", "--page-size", "--enable-hisparse", "--dcp-size", "--enable-lora",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "accelerator", "rule"),
    [
        ([], None, "unless several ranks of a node share a host tier: got on with --tp-size 1"),
        (
            ["--tp-size", "2", "--dp-size", "2", "--enable-dp-attention"],
            None,
            "unless several ranks of a node share a host tier: got on with --tp-size 2",
        ),
        (["--tp-size", "2"], "cuda", "on a GPU: got on."),
        (["--tp-size", "2"], None, None),
    ],
)
def test_shares_of_fetches(launch, flags, accelerator, rule):
    more = {} if accelerator is None else {"accelerator": accelerator}
    _, lines, *_ = launch(*flags, "--ess-fetch-share", "on", **more)
    assert lines == [] if rule is None else f"--ess-fetch-share must be off {rule}" in lines[0]
    assert launch(*flags, "--ess-fetch-share", "off", **more)[1] == []

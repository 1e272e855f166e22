"""Which architectures the launcher refuses. Its table is SGLang's list, with what is missing."""

import inspect
import re

import pytest
import torch

from sglang_ess.launch.architectures import ARCHITECTURES
from tests.support.launching import DSA, refused

HY4 = {**DSA, "architectures": ["HYV4ForCausalLM"]}
LONGCAT = {
    **DSA,
    "architectures": ["LongcatFlashForCausalLM"],
    "rope_scaling": {"rope_type": "yarn", "factor": 4},
    "zero_expert_type": None,
}


def test_the_table_has_every_architecture_that_sglang_calls_sparse():
    from sglang.srt.configs.model_config import is_deepseek_dsa

    words = re.findall(r'"(\w+)"', inspect.getsource(is_deepseek_dsa))
    named = {one for one in words if is_deepseek_dsa({"architectures": [one], "index_topk": 1})}
    drafts = {name for name in named if name.endswith("NextN")}
    assert set(ARCHITECTURES) == named - drafts


@pytest.mark.parametrize("name", [name for name, one in ARCHITECTURES.items() if one.missing])
def test_what_is_not_served_is_refused_in_one_line(launch, name):
    model = {**DSA, "architectures": [name]}
    missing = ARCHITECTURES[name].missing
    refused(launch(model=model), name, missing)
    refused(launch("--disable-ess", model=model), name, missing)
    refused(launch(model=model, accelerator="cuda"), name, missing, "--disable-ess")
    assert launch("--disable-ess", model=model, accelerator="cuda")[1] == []


@pytest.mark.parametrize("name", [name for name, one in ARCHITECTURES.items() if not one.missing])
def test_what_is_served_is_not_refused(launch, name):
    model = {**LONGCAT, "architectures": [name]}
    assert launch(model=model)[1] == []
    assert launch(model=model, accelerator="cuda")[1] == []


def test_dots3_still_requires_cuda(monkeypatch):
    """Once it does not, dots3-note can be tried on the CPU platform."""
    import sglang.srt.models.dots3_common.modeling as dots3

    monkeypatch.setattr(dots3, "_is_cuda", False)
    for part in (dots3.Dots3DecoderLayer, dots3.Dots3Model):
        assert "_require_cuda()" in inspect.getsource(part.__init__)
    with pytest.raises(RuntimeError, match="only supports CUDA"):
        dots3._require_cuda()


def test_mistrals_loader_still_skips_an_indexer():
    """Once it does not, Mistral Large 3 can be tried."""
    from sglang.srt.models.mistral_large_3 import MistralLarge3ForCausalLM

    def loaded(name):
        remap = MistralLarge3ForCausalLM._iterable_remap_mistral_to_ds
        return [new for new, _ in remap(MistralLarge3ForCausalLM, [(name, torch.empty(0))])]

    assert loaded("layers.0.attention.wq_a.weight") == ["model.layers.0.self_attn.q_a_proj.weight"]
    for part in ("wq_b", "wk", "k_norm", "weights_proj"):
        for prefix in ("layers.0.attention.", "model.layers.0.self_attn."):
            assert loaded(f"{prefix}indexer.{part}.weight") == []


def test_attention_sinks(launch):
    refused(launch("--kv-cache-dtype", "fp8_e4m3", model=HY4), "attention sinks", "fp8_e4m3")
    for mode in ("da", "dba"):
        result = launch("--ess-overlap", mode, model=HY4, accelerator="cuda")
        refused(result, "--ess-overlap must be off", f"got {mode}")
        assert launch("--ess-overlap", mode, accelerator="cuda")[1] == []
    result = launch("--ess-attention", "flashinfer", model=HY4, accelerator="cuda")
    refused(result, "--ess-attention must be sglang", "got flashinfer")


def test_longcat(launch):
    model = {**LONGCAT, "zero_expert_type": "identity"}
    refused(launch(model=model), "zero_expert_type", "'identity'")
    assert launch(model=model, accelerator="cuda")[1] == []
    refused(launch(model={**LONGCAT, "rope_scaling": None}), "rope_scaling")


def test_sizes_that_the_cpu_kernels_lack(launch):
    for field, size in (("kv_lora_rank", 256), ("qk_rope_head_dim", 128), ("index_head_dim", 64)):
        model = {**DSA, field: size}
        refused(launch(model=model), f"{field} ", "on the CPU platform", str(size))
        assert launch(model=model, accelerator="cuda")[1] == []

"""The tiny GLM-5.3-Flash in transformers and in SGLang's configuration."""

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from sglang_ess.testing.tiny_model import TinyModelConfig, write_tiny_model


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("glm5") / "model", TinyModelConfig("glm5_next"))


def test_transformers_finds_every_weight(path):
    model, info = AutoModelForImageTextToText.from_pretrained(
        path, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    kinds = [type(block.self_attn).__name__ for block in model.model.language_model.layers]
    assert kinds == ["Glm5NextTextLinearAttention", "Glm5NextTextAttention"] * 2
    assert type(AutoProcessor.from_pretrained(path)).__name__ == "Glm5NextProcessor"


def test_the_context_matters(path):
    """A token 200 positions back, past the linear layers' memory, changes the logits."""
    model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32)
    ids = torch.randint(0, 256, (1, 400), generator=torch.Generator().manual_seed(0))
    other = ids.clone()
    other[0, 150] += 1
    with torch.no_grad():
        one, two = (model(input_ids=x).logits[0, 350:].log_softmax(-1) for x in (ids, other))
    assert one.std() > 1
    assert (one - two).abs().max() > 0.1


def test_sglang_reads_the_config(path):
    from sglang.srt.configs.hybrid_arch import mambaish_config
    from sglang.srt.configs.model_config import ModelConfig, get_dsa_mtp_topk_width, is_deepseek_dsa

    model = ModelConfig(str(path))
    assert is_deepseek_dsa(model.hf_config)
    assert (model.dtype, model.context_len) == (torch.bfloat16, 16_384)
    assert (model.kv_lora_rank, model.qk_rope_head_dim) == (512, 0)
    assert get_dsa_mtp_topk_width(model.hf_config) == 128 + 3
    assert mambaish_config(model).full_attention_layer_ids == [1, 3]

"""The CPU platform beyond sparse attention: other models, mixed batches, sampling."""

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.support import parity
from tests.support.engine import EngineProcess


@pytest.fixture(scope="module")
def sparse_model(tmp_path_factory):
    return parity.write_model(tmp_path_factory.mktemp("model") / "v32", index_topk=32, heads=4)


def test_a_model_without_sparse_attention(tmp_path):
    """--disable-ess serves any model on this platform; here Llama, against transformers."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024,
        initializer_range=0.15,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    prompts = parity.prompts_of([9, 200])
    with EngineProcess(tmp_path, ess={"enabled": False}, dtype="float32") as engine:
        outputs = engine.generate(prompts, max_new_tokens=5)
    for prompt, output in zip(prompts, outputs, strict=True):
        ids = torch.tensor([prompt + output.token_ids])
        with torch.no_grad():
            logprobs = torch.log_softmax(model(ids).logits[0, :-1], -1)
        expected = logprobs.gather(1, ids[0, 1:, None])[:, 0].numpy()
        got = np.concatenate([output.prompt_logprobs, output.logprobs])
        assert np.abs(got - expected).max() < 1e-4 and expected.std() > 0.5


def test_mixed_chunks(sparse_model):
    """Decode steps that ride along with another request's prefill chunk, against transformers."""
    prompts = parity.prompts_of([40, 900, 350])
    args = {"chunked_prefill_size": 128, "max_running_requests": 3, "enable_mixed_chunk": True}
    with parity.EXACT.engine(sparse_model, **args) as engine:
        _, sequences = parity.scored(engine, prompts, new_tokens=30)
    parity.check(parity.compare(parity.EXACT, sparse_model, sequences).ratios())


def test_parallel_sampling_and_penalties(sparse_model):
    """Four samples of one prompt share its prefix and differ; a seed repeats them."""
    prompt = parity.prompts_of([300])[0]
    sampling = {"temperature": 1.0, "top_p": 0.9, "frequency_penalty": 0.5}
    with parity.FP8_ROWS.engine(sparse_model) as engine:
        outputs = engine.generate([prompt] * 4, max_new_tokens=12, start=-1, **sampling)
    assert len({tuple(output.token_ids) for output in outputs}) > 1
    assert all(len(output.token_ids) == 12 for output in outputs)
    assert all(np.isfinite(output.logprobs).all() for output in outputs)

"""The tiny model's MTP layer: SGLang's NextN loads all of it, and the target is as without it."""

import json
import re
import traceback

import pytest
import torch
from safetensors.torch import load_file

from sglang_ess.testing.tiny_model import ARCHS, TinyModelConfig, write_tiny_model
from tests.support import forked
from tests.support.oracle import reference_model

WITH_MTP = [name for name, arch in ARCHS.items() if arch.mtp]
DRAFTS = {
    "v32": "DeepseekV3ForCausalLMNextN",
    "v3": "DeepseekV3ForCausalLMNextN",
    "glm": "GlmMoeDsaForCausalLMNextN",
    "hy4": "HYV4ForCausalLMNextN",
}
# The draft runs with the target's.
OF_THE_TARGET = {"model.embed_tokens.weight", "lm_head.weight"}
REPEATED = (".embed_tokens.weight", ".shared_head.head.weight")
SECONDS = 120
every_arch = pytest.mark.parametrize("arch", WITH_MTP)


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """{arch: directory}; GLM's with one top-k for all draft steps."""
    root, models = tmp_path_factory.mktemp("mtp"), {}
    for arch in WITH_MTP:
        config = TinyModelConfig(
            arch=arch, mtp_layers=1, index_share_for_mtp_iteration=int(arch == "glm")
        )
        models[arch] = write_tiny_model(root / arch, config)
    return models


def weights(path):
    return load_file(path / "model.safetensors")


def split(path, arch):
    """(tensors of the target, tensors of the MTP layer), by name."""
    prefix = "model.mtp_layers.0." if arch == "hy4" else "model.layers.4."
    stored = weights(path)
    mtp = {name: one for name, one in stored.items() if name.startswith(prefix)}
    return {name: one for name, one in stored.items() if name not in mtp}, mtp


@every_arch
def test_the_target_is_the_one_without(paths, arch, tmp_path):
    without = write_tiny_model(tmp_path / "m", TinyModelConfig(arch=arch))
    target, mtp = split(paths[arch], arch)
    plain = weights(without)
    assert mtp and target.keys() == plain.keys()
    assert all(torch.equal(target[name], plain[name]) for name in plain)
    config, before = (json.loads((p / "config.json").read_text()) for p in (paths[arch], without))
    added = {name: config[name] for name in config.keys() - before.keys()}
    shared = {"index_share_for_mtp_iteration": True} if arch == "glm" else {}
    assert added == {"num_nextn_predict_layers": 1} | shared
    assert {name: config[name] for name in before} == before


@every_arch
def test_it_repeats_the_target_s_embeddings_and_head(paths, arch):
    target, mtp = split(paths[arch], arch)
    repeated = [name for name in mtp if name.endswith(REPEATED)]
    if arch == "hy4":
        assert not repeated
        return
    assert torch.equal(
        mtp["model.layers.4.embed_tokens.weight"], target["model.embed_tokens.weight"]
    )
    assert torch.equal(mtp["model.layers.4.shared_head.head.weight"], target["lm_head.weight"])


@every_arch
def test_transformers_leaves_it_out(paths, arch):
    _, info = reference_model(paths[arch], output_loading_info=True)
    _, mtp = split(paths[arch], arch)
    # transformers stacks experts as it reads; the names of Hy4's layer it knows.
    stacked = {re.sub(r"experts\.\d+\.(down|gate|up)_proj\.weight", "experts", one) for one in mtp}
    unexpected = {
        re.sub(r"experts\.(down|gate_up)_proj$", "experts", one)
        for one in info.pop("unexpected_keys")
    }
    assert unexpected == (set() if arch == "hy4" else stacked)
    assert not any(info.values()), info


@every_arch
@pytest.mark.parametrize("draft", [True, False], ids=["draft", "target"])
def test_sglang_loads_each_parameter(paths, arch, draft):
    """SGLang's class for a draft (or target) has no parameter that the checkpoint lacks, and the
    checkpoint no value of that layer (or the others) that the class lacks."""
    receive, send = forked.context.Pipe(duplex=False)
    process = forked.context.Process(target=_load, args=(send, str(paths[arch]), draft))
    process.start()
    send.close()
    try:
        assert receive.poll(SECONDS), f"no answer within {SECONDS} s"
        worked, answer = receive.recv()
    finally:
        process.kill()
        process.join()
    assert worked, answer
    name, parameters = answer
    assert name == (DRAFTS[arch] if draft else ARCHS[arch].architecture)
    absent = {one for one, (_, loaded) in parameters.items() if not loaded}
    assert absent == (OF_THE_TARGET if draft else set())
    target, mtp = split(paths[arch], arch)
    stored = {n: one for n, one in mtp.items() if not n.endswith(REPEATED)} if draft else target
    counts = [count for one, (count, _) in parameters.items() if one not in absent]
    assert sum(counts) == sum(one.numel() for one in stored.values())


def _load(pipe, path, draft) -> None:
    try:
        pipe.send((True, _loaded_parameters(path, draft)))
    except BaseException:
        pipe.send((False, traceback.format_exc()))


def _loaded_parameters(path, draft):
    """(architecture, {parameter: (values, whether all are loaded)}) of SGLang's own loading."""
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.distributed import parallel_state
    from sglang.srt.model_loader.utils import get_model_architecture
    from sglang.srt.runtime_context import SpawnRanks, publish
    from sglang.srt.server_args import ServerArgs

    publish(ServerArgs(model_path=path), role="scheduler", ranks=SpawnRanks(world_rank=0))
    parallel_state.init_distributed_environment(1, 0, f"file://{path}/ranks", backend="gloo")
    parallel_state.initialize_model_parallel(backend="gloo")
    config = ModelConfig(path, is_draft_model=draft)
    model_class, name = get_model_architecture(config)
    torch.set_default_dtype(config.dtype)
    model = model_class(config.hf_config)
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    model.load_weights(iter(load_file(f"{path}/model.safetensors").items()))
    return name, {
        name: (parameter.numel(), not parameter.isnan().any().item())
        for name, parameter in model.named_parameters()
    }


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"mtp_layers": 2}, "mtp_layers must be 0 or 1: got 2"),
        ({"mtp_layers": 1, "arch": "longcat"}, "mtp_layers must be 0 for arch longcat: got 1"),
        ({"mtp_layers": 1, "layers": 1}, "layers must be >= 2 with an MTP layer: got 1"),
        (
            {"index_share_for_mtp_iteration": 1},
            "index_share_for_mtp_iteration must be 0 without an MTP layer: got 1",
        ),
    ],
)
def test_bad_config_is_refused(changes, message):
    with pytest.raises(ValueError) as caught:
        TinyModelConfig(**changes)
    assert message in str(caught.value)

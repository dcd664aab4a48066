"""What is bf16 and what is fp32 inside a sharded model (FSDP2 on one gloo process)."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.testing import assert_close

from ratplus_exp.memory import Memory
from ratplus_exp.models import config_for, new_model
from ratplus_exp.training.parallel import Objective, shard

SIZES = {
    "vocab_size": 29,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}


@pytest.fixture
def mesh(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("family", ["olmo2", "ratplus"])
def test_rope_is_as_precise_in_training_as_in_evaluation(mesh, make_ids, family):
    """OLMo2 turns queries and keys by fp32 tables whatever its weights are; P2's by its weights'.
    The residual stream is bf16 from the embedding on."""
    ids, seen = make_ids(2, 16), {}
    config = config_for(SIZES | {"model_type": family}, memory=True)

    def watch(where, model):
        def note(layer, args, kwargs):
            stream, rope = args[:2] or (kwargs["hidden_states"], kwargs["position_embeddings"])
            seen.setdefault(where, []).append((stream.dtype, *(table.dtype for table in rope)))

        for layer in model.model.layers:
            part = layer.self_attn if family == "olmo2" else layer.attention
            part.register_forward_pre_hook(note, with_kwargs=True)
        return model

    evaluated = watch("evaluation", new_model(config, 0).to(torch.bfloat16).eval())
    with torch.no_grad():
        wanted = evaluated.model(ids, use_cache=False).last_hidden_state
    trained = new_model(config, 0)
    objective = shard(Objective(trained, bf16=True), mesh)
    watch("training", trained)
    loss, _ = objective(ids, ids)
    loss.backward()
    hidden = objective(ids)[0]
    assert set(seen["training"][:2]) == {seen["evaluation"][0]} and len(seen["evaluation"]) == 2
    assert seen["training"][0][0] == torch.bfloat16
    if family == "olmo2":
        assert seen["training"][0][1:] == (torch.float32, torch.float32)
    assert_close(hidden.float(), wanted.float(), rtol=0.05, atol=0.05)
    for module in trained.modules():
        if isinstance(module, Memory):
            assert module.weight.grad.dtype == torch.float32

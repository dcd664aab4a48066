"""From a GGUF file to an evaluated model, by the commands that a user types."""

import json

import gguf
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ratplus_exp.models.loading import end_tokens, load_model, load_tokenizer
from ratplus_exp.provenance import REPOSITORY
from ratplus_exp.store import Store

TOKENIZER = REPOSITORY / "outputs/reference/small/tokenizer/tokenizer.json"
END = 1  # EOS of that tokenizer
LAYERS, HEADS, KV_HEADS = 2, 2, 1


@pytest.fixture(scope="module")
def model():
    """A tiny random Llama, which ends with END."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(json.loads(TOKENIZER.read_text())["model"]["vocab"]),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},
        initializer_range=0.3,
        tie_word_embeddings=True,
        eos_token_id=END,
    )
    return LlamaForCausalLM(config)


@pytest.fixture
def file(model, tmp_path):
    """The model as llama.cpp writes it: matrices in Q4_1, rows of q and k with each head's two
    halves interleaved."""
    path = tmp_path / "tiny.Q4_1.gguf"
    writer, config = gguf.GGUFWriter(path, "llama"), model.config
    writer.add_block_count(LAYERS)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(1e5)
    writer.add_vocab_size(config.vocab_size)
    bpe = json.loads(TOKENIZER.read_text())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(bpe["vocab"], key=bpe["vocab"].get))
    writer.add_token_merges([" ".join(pair) for pair in bpe["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(END)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, LAYERS)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        values = tensor.numpy()
        for part, heads in (("q_proj", HEADS), ("k_proj", KV_HEADS)):
            if part in name:
                rows, columns = values.shape
                halves = values.reshape(heads, 2, rows // heads // 2, columns)
                values = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows, columns)
        target = names.get_name(name, try_suffixes=(".weight",))
        if tensor.ndim == 1:
            writer.add_tensor(target, values)
        else:
            kind = gguf.GGMLQuantizationType.Q4_1
            writer.add_tensor(target, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_converted_equal_within_quantisation_and_evaluated(job, model, file, tmp_path):
    folder = tmp_path / "converted"
    job("stage=convert", f"checkpoint={file}", f"model.path={folder}", "stage.dtype=null")
    loaded = load_model(folder, torch.device("cpu"))
    found = loaded.state_dict()
    for name, wanted in model.state_dict().items():
        blocks = wanted.reshape(-1, 32)
        # 16 levels between a block's ends, which are kept in fp16
        step = (blocks.amax(1) - blocks.amin(1)) / 15
        slack = step / 2 + 1e-3 * blocks.abs().amax(1) * 2
        assert ((found[name].reshape(-1, 32) - blocks).abs() <= slack[:, None]).all(), name
        if wanted.ndim == 2:
            assert not torch.equal(found[name], wanted)
    assert end_tokens(folder) == [END] == [load_tokenizer(folder).eos_token_id]
    (folder / "generation_config.json").write_text('{"temperature": 0.6}')  # no EOS: config.json's
    assert end_tokens(folder) == [END]
    settings = ("data=ruler", "data.length=256", "data.tasks=[S-1]", "data.examples=1")
    job("model=hf", f"model.path={folder}", "model.name=tiny", "budget=1/2", *settings)
    (cell,) = Store(job.folder / "results").cells("eval")
    assert cell.done() == 1


@pytest.mark.parametrize("content", [None, b"GGUF of nothing"])
def test_a_file_that_cannot_be_read_is_refused(job, tmp_path, content):
    file = tmp_path / "broken.gguf"
    if content:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=r"broken\.gguf cannot be read"):
        job("stage=convert", f"checkpoint={file}", f"model.path={tmp_path / 'converted'}")
    assert not (tmp_path / "converted").exists()

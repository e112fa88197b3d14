"""Checkpoint files: slices, several files with an index, what is copied beside them."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from spmd_rl.architecture import read
from spmd_rl.weights import hf
from spmd_rl.weights.names import NameMap
from tests.models import tiny_model


def test_several_files_with_an_index(tmp_path):
    model = tiny_model("qwen2", kv_heads=2)
    tensors = load_file(model / "model.safetensors")
    hf.save(tmp_path, iter(tensors.items()), model, torch.float32, shard_bytes=40_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(p.name for p in tmp_path.glob("*.safetensors"))
    assert len(files) > 2 and set(index["weight_map"].values()) == set(files)
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert index["metadata"]["total_size"] == sum(4 * t.numel() for t in tensors.values())
    assert hf.count(tmp_path) == hf.count(model) == sum(t.numel() for t in tensors.values())
    with hf.Checkpoint(tmp_path) as checkpoint:
        for name, tensor in tensors.items():
            assert torch.equal(checkpoint.slice(name)[1:3], tensor[1:3])
    from transformers import AutoModelForCausalLM

    loaded = dict(AutoModelForCausalLM.from_pretrained(tmp_path).named_parameters())
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_files_beside_the_weights_and_the_dtype(tmp_path):
    model = tiny_model("qwen3")
    hf.save(tmp_path, iter({"x": torch.zeros(2)}.items()), model, torch.bfloat16)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.get("dtype", config.get("torch_dtype")) == "bfloat16"
    assert (tmp_path / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()
    assert not list(tmp_path.glob("*.index.json"))


def test_a_checkpoint_that_does_not_fit_is_named(tmp_path):
    model = tiny_model("qwen3", tied=True)
    names = NameMap(read(model))
    wrong = [("decoder.final_layernorm.weight", torch.zeros(3))]
    with pytest.raises(ValueError, match="decoder.final_layernorm.weight has shape"):
        hf.load(model, wrong, names)
    names.tied = False
    with pytest.raises(ValueError, match="holds no tensor 'lm_head.weight'"):
        hf.load(model, [("output_layer.weight", torch.zeros(3))], names)
    with pytest.raises(ValueError, match="has no model.safetensors"):
        hf.Checkpoint(tmp_path)

"""Converters, as users run them: bit for bit there and back, whole or not at all."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml
from safetensors.torch import load_file, save_file

from spmd_rl.weights.convert import whole_or_nothing
from tests.models import ROOT, tiny_model
from tools.convert_hf_to_fp8 import convert as to_fp8

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def run(*words: object, ok: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip
    assert (done.returncode == 0) == ok, done.stderr
    return done


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same(folder: Path, other: Path) -> None:
    found, want = tensors(folder), tensors(other)
    assert found.keys() == want.keys()
    assert all(torch.equal(found[name], value) for name, value in want.items())


@pytest.fixture(scope="module")
def model():
    return tiny_model("glm4_moe", layers=3, vocab=275, tied=False)


@pytest.fixture(scope="module")
def release(model, tmp_path_factory):
    """The model as torch_dist, written by two processes that hold unequally many layers."""
    folder = tmp_path_factory.mktemp("torch_dist")
    script = ["tools/convert_hf_to_torch_dist.py", "--hf-checkpoint", model, "--dtype", "float32"]
    run(*TORCHRUN, *script, "--save", folder / "made")
    assert (folder / "made/latest_checkpointed_iteration.txt").read_text() == "release"
    return folder / "made/release"


def test_to_torch_dist_and_back(release, model, tmp_path):
    words = ["--origin-hf-dir", model, "--output-dir", tmp_path / "hf"]
    run("tools/convert_torch_dist_to_hf.py", "--input-dir", release, *words)
    assert_same(tmp_path / "hf", model)
    again = run("tools/convert_torch_dist_to_hf.py", "--input-dir", release, *words, ok=False)
    assert again.stderr.strip().startswith("--output-dir") and "exists already" in again.stderr
    elsewhere = run(
        "tools/convert_torch_dist_to_hf.py", "--input-dir", tmp_path, "--origin-hf-dir", model,
        "--output-dir", tmp_path / "other", ok=False,
    )  # fmt: skip
    assert "holds no .metadata" in elsewhere.stderr and not (tmp_path / "other").exists()


def test_any_checkpoint_in_another_layout(release, model, tmp_path):
    """Saved by two stages, read by two expert ranks, written as weights are pushed."""
    values = {
        "placement": {"device": "cpu", "colocate": True},
        "model": {"hf_checkpoint": str(model)},
        "rollout": {"rollout_batch_size": 8, "n_samples_per_prompt": 2, "num_rollout": 1},
        "megatron": {"expert_model_parallel_size": 2, "expert_tensor_parallel_size": 1},
    }
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(values))
    words = ["--config", config, "--input-dir", release, "--output-dir", tmp_path / "hf"]
    run(*TORCHRUN, "tools/convert_to_hf.py", *words)
    assert_same(tmp_path / "hf", model)


def test_model_state_of_fsdp(tmp_path):
    model = tiny_model("qwen3", tied=False)
    state = tensors(model)
    padded = torch.nn.functional.pad(state["lm_head.weight"], (0, 0, 0, 5))
    dcp.save(
        {"app": {"model": state | {"lm_head.weight": padded}}, "optim": {"step": torch.ones(1)}},
        checkpoint_id=tmp_path / "fsdp",
        no_dist=True,
    )
    words = ["--origin-hf-dir", model, "--output-dir", tmp_path / "hf"]
    run("tools/convert_fsdp_to_hf.py", "--input-dir", tmp_path / "fsdp", *words)
    assert_same(tmp_path / "hf", model)


def test_fp8_blocks(tmp_path):
    """Dequantised, a projection is within e4m3's rounding; the rest keeps its bits."""
    model = tiny_model("qwen3", hidden=160, heads=5, kv_heads=1)  # no multiple of 128
    to_fp8(model, tmp_path / "fp8")
    found, want = tensors(tmp_path / "fp8"), tensors(model)
    for name, value in want.items():
        if not name.endswith("_proj.weight"):
            assert torch.equal(found[name], value)
            continue
        small, scales = found[name], found[f"{name}_scale_inv"]
        assert small.dtype == torch.float8_e4m3fn and scales.dtype == torch.float32
        assert scales.shape == (-(-value.size(0) // 128), -(-value.size(1) // 128))
        spread = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)
        spread = spread[: value.size(0), : value.size(1)]
        step = (value.abs() / 16).maximum(spread / 512)  # half a step, also of the smallest numbers
        assert ((small.float() * spread - value).abs() <= step).all(), name
    config = json.loads((tmp_path / "fp8/config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "fp8" and config["weight_block_size"] == [128, 128]
    with pytest.raises(ValueError, match="quantised already"):
        to_fp8(tmp_path / "fp8", tmp_path / "twice")


def test_what_is_interrupted_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), whole_or_nothing(tmp_path / "out", "--save") as aside:
        save_file({"a": torch.ones(1)}, aside / "half.safetensors")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())

#!/usr/bin/env python3
"""Quantise a Hugging Face directory to block-wise fp8 (e4m3, 128 x 128), as SGLang reads it.

  python tools/convert_hf_to_fp8.py --model-dir models/Qwen3-4B --save-dir models/Qwen3-4B-FP8

Projections become float8_e4m3fn with a float32 `weight_scale_inv` for each block; embeddings,
output layer, norms, biases and routers stay as they are.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

LARGEST = 448.0  # of e4m3


def quantise(weight, block: int = 128):
    """[rows, columns] -> float8_e4m3fn of that shape, float32 scales [rows / block, columns /
    block], rounded up; weight = quantised x scale.
    """
    import torch

    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight.float(), (0, -columns % block, 0, -rows % block))
    blocks = padded.view(-(-rows // block), block, -(-columns // block), block)
    scales = blocks.abs().amax((1, 3)).clamp(min=1e-12) / LARGEST
    small = (blocks / scales[:, None, :, None]).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
    return small.view(padded.shape)[:rows, :columns].contiguous(), scales


def convert(source: Path, target: Path, block: int = 128) -> None:
    import torch

    from spmd_rl.weights import hf
    from spmd_rl.weights.convert import progress, whole_or_nothing

    config = json.loads((source / "config.json").read_text())
    if config.get("quantization_config"):
        raise ValueError(f"--model-dir {source} is quantised already: give the original")
    kept: list[str] = []

    def stream(checkpoint: hf.Checkpoint) -> Iterator[tuple[str, torch.Tensor]]:
        for name in progress(sorted(checkpoint.where), len(checkpoint.where)):
            tensor = checkpoint.slice(name)[:]
            if tensor.ndim == 2 and name.endswith("_proj.weight"):
                small, scales = quantise(tensor, block)
                yield name, small
                yield f"{name}_scale_inv", scales
                continue
            if tensor.ndim == 2 and "embed" not in name:
                kept.append(name.removesuffix(".weight"))
            yield name, tensor

    with whole_or_nothing(target, "--save-dir") as aside:
        with hf.Checkpoint(source) as checkpoint:
            dtype = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
            hf.save(aside, stream(checkpoint), source, getattr(torch, dtype))
        config["quantization_config"] = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [block, block],
            "modules_to_not_convert": kept,
        }
        (aside / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model-dir", type=Path, required=True)
    parser.add_argument("--save-dir", type=Path, required=True)
    parser.add_argument("--block-size", type=int, default=128)
    options = parser.parse_args()
    try:
        convert(options.model_dir, options.save_dir, options.block_size)
    except ValueError as error:
        sys.exit(str(error))
    print(f"wrote {options.save_dir}")


if __name__ == "__main__":
    main()

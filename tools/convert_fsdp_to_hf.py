#!/usr/bin/env python3
"""Turn the model state of an FSDP (torch.distributed.checkpoint) checkpoint into a Hugging Face
directory. One process, no GPU.

  python tools/convert_fsdp_to_hf.py --input-dir ckpt/iter_10/model --output-dir out \
      --origin-hf-dir models/Qwen3-4B

Tensors are found by their Hugging Face names, whatever prefix they were saved under.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

ANCHOR = "model.embed_tokens.weight"  # every family has it


def convert(source: Path, target: Path, origin: Path) -> None:
    from spmd_rl.weights import hf
    from spmd_rl.weights.convert import progress, whole_or_nothing
    from spmd_rl.weights.torch_dist import Reader

    reader = Reader(source)
    weights = [key for key in reader.tensors if "optim" not in key]
    anchors = [key for key in weights if key.endswith(ANCHOR)]
    if len(anchors) != 1:
        raise ValueError(
            f"--input-dir {source} holds {len(anchors)} tensors named ...{ANCHOR} instead of one: "
            "give the directory of the model's state"
        )
    prefix = anchors[0].removesuffix(ANCHOR)
    with hf.Checkpoint(origin) as checkpoint:
        wanted = {name: tuple(checkpoint.slice(name).get_shape()) for name in checkpoint.where}
    missing = [name for name in wanted if prefix + name not in reader.tensors]
    if missing:
        raise ValueError(
            f"--input-dir {source} lacks {len(missing)} of the model's {len(wanted)} tensors "
            f"({', '.join(missing[:3])}, ...): is --origin-hf-dir the model it was trained from?"
        )

    def stream() -> Iterator:
        for name, shape in progress(sorted(wanted.items()), len(wanted)):
            tensor = reader.read(prefix + name)
            if len(shape) == 2:  # a vocabulary may be padded
                tensor = tensor[: shape[0]]
            yield name, tensor

    dtype = reader.tensors[anchors[0]].properties.dtype
    with whole_or_nothing(target, "--output-dir") as aside:
        hf.save(aside, stream(), origin, dtype)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--input-dir", type=Path, required=True)
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--origin-hf-dir", type=Path, required=True)
    options = parser.parse_args()
    try:
        convert(options.input_dir, options.output_dir, options.origin_hf_dir)
    except ValueError as error:
        sys.exit(str(error))
    print(f"wrote {options.output_dir}")


if __name__ == "__main__":
    main()

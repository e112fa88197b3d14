#!/usr/bin/env python3
"""Turn a torch_dist checkpoint of any layout into a Hugging Face directory. One process, no GPU.

  python tools/convert_torch_dist_to_hf.py --input-dir runs/x/checkpoints/rollout_99 \
      --output-dir out --origin-hf-dir models/Qwen3-4B

config.json, tokenizer and generation settings are those of --origin-hf-dir. At most one tensor and
one file of the output are in memory at a time.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def convert(source: Path, target: Path, origin: Path, vocab_size: int | None = None) -> None:
    from spmd_rl import architecture
    from spmd_rl.weights import convert, hf, torch_dist
    from spmd_rl.weights.names import NameMap

    shape = architecture.read_shape(origin)
    names = NameMap(shape)
    names.vocab_size = vocab_size or names.vocab_size
    reader = torch_dist.Reader(source)
    dtype = reader.tensors["decoder.final_layernorm.weight"].properties.dtype
    with convert.whole_or_nothing(target, "--output-dir") as aside:
        stream = torch_dist.hf_tensors(reader, names, len(shape.expert_layers))
        with hf.Checkpoint(origin) as checkpoint:
            wanted = len(checkpoint.where)
        hf.save(aside, convert.progress(stream, wanted), origin, dtype)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--input-dir", type=Path, required=True)
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--origin-hf-dir", type=Path, required=True)
    parser.add_argument("--vocab-size", type=int, help="rows to keep; default: config.json's")
    options = parser.parse_args()
    try:
        convert(options.input_dir, options.output_dir, options.origin_hf_dir, options.vocab_size)
    except ValueError as error:
        sys.exit(str(error))
    print(f"wrote {options.output_dir}")


if __name__ == "__main__":
    main()

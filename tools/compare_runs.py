"""Whether runs are the same, bit for bit: weights, sampled tokens, metrics.

    python tools/compare_runs.py runs/first runs/second [runs/third ...]

Compares every tensor file of `hf/`, the samples that `debug.save_debug_rollout_data` left in
`rollouts/`, and every metric that is no timing. Exit status 1 when anything differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

# Metrics that no two runs share: times, and what an engine finds in its prefix cache (one that was
# just started finds nothing there).
OF_THE_MOMENT = ("perf/", "time", "rollout/prefix_cache", "rollout/avg_cached")


def outcome(run_dir: Path) -> dict[str, Any]:
    """What must be equal: hashes of weights and of sampled tokens, metrics that are no timings."""
    import torch

    def digest(data: bytes) -> str:
        return hashlib.sha256(data).hexdigest()[:16]

    found: dict[str, Any] = {}
    for path in sorted((run_dir / "hf").glob("*.safetensors")):
        found[f"weights {path.name}"] = digest(path.read_bytes())
    for path in sorted((run_dir / "rollouts").glob("*.pt")):
        content = torch.load(path, weights_only=True)
        found[f"samples {path.stem}"] = digest(repr(content).encode())
    for number, line in enumerate((run_dir / "metrics.jsonl").read_text().splitlines()):
        found[f"metrics line {number}"] = lasting(json.loads(line))
    return found


def lasting(values: dict[str, Any]) -> dict[str, Any]:
    """A line of metrics without what is of the moment."""
    return {name: value for name, value in values.items() if not name.startswith(OF_THE_MOMENT)}


def compare(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """What differs, in words."""
    words = [f"{name} is missing" for name in expected.keys() - found.keys()]
    words += [f"{name} is too many" for name in found.keys() - expected.keys()]
    for name in expected.keys() & found.keys():
        if found[name] != expected[name]:
            detail = ""
            if isinstance(found[name], dict):
                both = found[name].keys() | expected[name].keys()
                wrong = sorted(k for k in both if found[name].get(k) != expected[name].get(k))
                detail = f" in {', '.join(wrong[:4])}"
            words.append(f"{name} differs{detail}")
    return sorted(words)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    first, *others = parser.parse_args().runs
    expected, same = outcome(first), True
    for name, value in expected.items():
        if isinstance(value, str):
            print(f"{value}  {name}")
    for other in others:
        differences = compare(outcome(other), expected)
        same = same and not differences
        print(f"{other} against {first}: {'; '.join(differences) or 'bitwise equal'}")
    return 0 if same and expected else 1


if __name__ == "__main__":
    sys.exit(main())

"""How much memory log-probs and entropies take beyond the logits, and how long.

  python tools/bench_logprob.py --rows 32768 --vocab 151936 --dtype bfloat16 --chunk 1024

Prints, for forward and backward, the most bytes that were alive at once (on a CPU by the
allocator's own events, on a GPU by its counter) beside the bound: chunk x vocabulary in float32,
plus the gradient of the logits in backward.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402

from spmd_rl.trainer.logprob import log_probs_and_entropy  # noqa: E402


def peak_bytes(work: Callable[[], None], device: torch.device) -> int:
    """The most bytes alive at once that `work` allocated."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        work()
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


def measure(rows: int, vocab: int, dtype: torch.dtype, chunk: int, device: torch.device) -> dict:
    """Bytes and seconds of forward and backward."""
    logits = torch.empty(rows, vocab, dtype=dtype, device=device)
    for start in range(0, rows, 1024):
        logits[start : start + 1024].normal_()
    logits.requires_grad_()
    targets = torch.randint(0, vocab, (rows,), device=device)
    found, seconds = {}, {}

    def forward() -> None:
        began = time.perf_counter()
        found["log_prob"], found["entropy"] = log_probs_and_entropy(
            logits, targets, vocab, 1.0, chunk
        )
        seconds["forward"] = time.perf_counter() - began

    def backward() -> None:
        loss = found["log_prob"].sum() + 0.1 * found["entropy"].sum()
        began = time.perf_counter()
        loss.backward()
        seconds["backward"] = time.perf_counter() - began

    peaks = {"forward": peak_bytes(forward, device), "backward": peak_bytes(backward, device)}
    peaks["backward"] -= logits.numel() * logits.element_size()  # the gradient itself
    return {"bound": chunk * vocab * 4, "peaks": peaks, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=32768)
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--chunk", type=int, default=1024)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    result = measure(args.rows, args.vocab, dtype, args.chunk, torch.device(args.device))
    gib = 2**30
    print(f"logits {args.rows} x {args.vocab} {args.dtype}, chunk {args.chunk}, {args.device}")
    for name, peak in result["peaks"].items():
        print(
            f"{name}: {peak / gib:.3f} GiB beyond logits (and their gradient); "
            f"chunk x vocabulary in float32 is {result['bound'] / gib:.3f} GiB; "
            f"{result['seconds'][name]:.2f} s"
        )


if __name__ == "__main__":
    main()

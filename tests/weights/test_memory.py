"""Host memory of reading and writing Hugging Face files: a rank's own part and little more."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.models import tiny_model
from tests.ranks import run_ranks
from tests.trainer.cases import Ranks, ok, placement

REST = 8 * 1024**2  # what the interpreter, gloo and the allocator keep besides
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "1048576"}  # what is freed goes back: the tensors are small


class Anonymous:
    """The most memory of the process that is no page of a file, in bytes, while it is entered."""

    def __enter__(self) -> Anonymous:
        self.before = self.most = anonymous()
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()
        self.growth = max(self.most, anonymous()) - self.before

    def _watch(self) -> None:
        while not self.ended.wait(0.001):
            self.most = max(self.most, anonymous())


def anonymous() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise AssertionError("the kernel says no RssAnon")


def rank_memory(model: str, folder: str) -> None:
    """Build the model alone, load it, write it; what each took."""
    from spmd_rl import architecture
    from spmd_rl.trainer import cpu_compat, parallel
    from spmd_rl.trainer import model as building
    from spmd_rl.weights import export, hf
    from spmd_rl.weights.names import NameMap

    with Ranks() as ranks:
        device, shape = torch.device("cpu"), architecture.read(model)
        cpu_compat.enable(device)
        groups = parallel.initialise(placement(2, tp=2), {}, seed=0)
        made = building.transformer_config(shape, {}, groups, device)
        chunks, names = building.build(shape, made, device), NameMap(shape)
        ours = export.named_tensors(chunks)
        split = (groups.tp_rank, groups.tp_size)
        with Anonymous() as loading:
            hf.load(model, ours, names, split, split)
        with Anonymous() as writing:
            tensors = export.hf_tensors(chunks, names, groups)
            if ranks.rank == 0:
                hf.save(f"{folder}/hf", tensors, model, torch.float32)
            else:
                for _ in tensors:
                    pass
        largest = max(t.nbytes * (1 if names.sources(n).kind == "whole" else 2) for n, t in ours)
        found = {
            "own": sum(t.nbytes for _, t in ours),
            "largest": largest,
            "loading": loading.growth,
            "writing": writing.growth,
        }
        print("memory:", json.dumps(found), flush=True)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("memory")
    model = tiny_model("qwen3", hidden=512, layers=8, ffn=3072, tied=False)
    done = run_ranks(2, rank_memory, str(model), str(folder), limit=120, env=ALLOCATOR)
    ok(done)
    return folder, model, [json.loads(line) for line in done.lines("memory: ")]


def test_peaks(found):
    """Loading fills what the rank holds; the rest is for tensors on their way."""
    for rank in found[2]:
        assert rank["own"] > 5 * rank["largest"]
        assert rank["loading"] <= rank["own"] + 2 * rank["largest"] + REST, rank
        assert rank["writing"] <= 2 * rank["largest"] + REST, rank


def test_the_files_are_the_models(found):
    folder, model, _ = found
    saved, want = load_file(folder / "hf/model.safetensors"), load_file(model / "model.safetensors")
    assert saved.keys() == want.keys()
    assert all(torch.equal(saved[name], value) for name, value in want.items())

"""One moment of training on disk, and back: weights, optimizers, schedules, random state.

A save has three parts. `begin` lets a thread copy this rank's share to host memory and write it.
`copied` waits for the copy, before weights change: a rollout is collected meanwhile, so there is
seldom anything to wait for. `finish`, collective, waits for the writers and adds the index. The
format is Megatron's torch_dist; a checkpoint loads into another tp, pp, cp or dp. The actor's
tensors have Megatron's names; those of a critic, and of a reference model that moves, stand beside
them with a prefix. The caller makes directories appear atomically; nothing here knows of rollouts.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from spmd_rl import disk
from spmd_rl.trainer.parallel import Groups
from spmd_rl.trainer.pieces import Piece, optimizers, to_load, to_save
from spmd_rl.trainer.reference import Reference
from spmd_rl.trainer.shards import Image, Stored, write_index

ABOUT = "trainer.json"  # what is no tensor: schedule, layout, counts
REFERENCE = "reference"  # prefix of its tensors' names
LOWEST = 19  # priority: where cores are few, copying and writing yield to all that computes
# Seconds before copying: a priority counts only within a session, and torchrun gives each rank its
# own, so where cores are few one rank's copying would hold up the others' answers.
AFTER_ALL_BEGAN = 0.2
# What Megatron's dist_checkpointing looks for besides the index.
BACKEND = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


class Model(NamedTuple):
    """What a checkpoint holds of a model."""

    chunks: list[Any]
    optimizer: Any | None  # None: weights only
    schedule: Any


Models = dict[str, Model]  # "actor" and perhaps "critic"


class Saver:
    """Writes this rank's share of checkpoints, one at a time. Memory is kept from one save to the
    next when they are asynchronous: its first use costs as much as the copy.
    """

    def __init__(self, groups: Groups, device: torch.device, keep: bool):
        self.groups, self.device, self.keep = groups, device, keep
        self.image: Image | None = None
        self.thread: threading.Thread | None = None
        self.awaited = threading.Event()
        self.copy: Future[None] = Future()
        self.copy.set_result(None)
        self.failure: OSError | None = None
        self.directory = Path()
        self.about: dict[str, Any] = {}  # what is no tensor, as it was at `begin`

    def begin(
        self,
        directory: str | Path,
        models: Models,
        random: bool,
        reference: Reference | None = None,
    ) -> None:
        """Start to copy and to write. Nothing may change before copied(); what is no tensor, the
        random state and a `reference` are taken now.
        """
        assert self.thread is None, "finish() comes before the next begin()"
        pieces = _random_pieces(self.groups) if random else []
        for name, model in models.items():
            found = to_save(model.chunks, model.optimizer, _metadata(self.groups))
            pieces += _prefixed(found, name)
        if reference is not None:
            pieces += _prefixed(_weights_of(reference, models["actor"], self.groups), REFERENCE)
        if self.image is None or not self.image.fits(pieces):
            file = f"__{dist.get_rank()}_0.distcp"
            self.image = Image(pieces, file, pinned=self.device.type == "cuda")
        self.about = _about(self.groups, models)
        self.failure, self.directory = None, Path(directory)
        self.copy = Future()
        self.awaited.clear()
        self.thread = threading.Thread(target=self._run, args=(self.image, pieces))
        self.thread.daemon = True  # an end for another reason must not wait for the disk
        self.thread.start()

    def _run(self, image: Image, pieces: list[Piece]) -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOWEST)  # of this thread alone
        self.awaited.wait(AFTER_ALL_BEGAN)
        try:
            image.fill(pieces)
        except Exception as error:
            self.copy.set_exception(error)
            return
        self.copy.set_result(None)
        try:
            image.write(self.directory)
        except OSError as error:
            self.failure = error

    def copied(self) -> None:
        """Wait until training may change what is being saved."""
        self.awaited.set()
        self.copy.result()

    @property
    def writing(self) -> bool:
        return self.thread is not None and self.thread.is_alive()

    def finish(self) -> dict[str, Any]:
        """Collective: wait for the disk; the first rank adds what makes it a checkpoint.

        Returns this rank's `bytes` and, where writing failed, the `failure` in words and whether
        the disk was `full`. With any failure the directory holds no checkpoint.
        """
        assert self.thread is not None and self.image is not None
        self.copied()
        self.thread.join()
        self.thread = None
        answer: dict[str, Any] = {"bytes": len(self.image.bytes)}
        mine = (
            self.image.chunks,
            {name: about["step"] for name, about in _parts(self.about).items()},
            self.failure is None,
        )
        found: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object(mine, found)
        try:
            if found is not None and all(written for _, _, written in found):
                for name, about in _parts(self.about).items():
                    about["step"] = max(steps[name] for _, steps, _ in found)
                chunks = [chunk for listed, _, _ in found for chunk in listed]
                _complete(self.directory, chunks, self.about)
        except OSError as error:
            self.failure = error
        if not self.keep:
            self.image = None
        if self.failure is not None:
            full = self.failure.errno in (errno.ENOSPC, errno.EDQUOT)
            answer |= {"failure": str(self.failure), "full": full}
        return answer


def save(
    directory: str | Path,
    chunks: list[Any],
    optimizer: Any | None,
    schedule: Any,
    groups: Groups,
) -> None:
    """Collective: both halves at once, for converters. `optimizer` None: weights only."""
    Path(directory).mkdir(parents=True, exist_ok=True)
    saver = Saver(groups, torch.device("cpu"), keep=False)
    saver.begin(directory, {"actor": Model(chunks, optimizer, schedule)}, random=False)
    answer = saver.finish()
    if "failure" in answer:
        raise OSError(f"{directory} cannot be written: {answer['failure']}")


def _weights_of(reference: Reference, actor: Model, groups: Groups) -> list[Piece]:
    """A copy of what this rank writes of them, which lies where the actor's lie."""
    with reference.swapped_in():
        pieces = to_save(actor.chunks, None, _metadata(groups))
        return [dataclasses.replace(p, values=p.values.to("cpu", copy=True)) for p in pieces]


def _prefixed(pieces: list[Piece], name: str) -> list[Piece]:
    if name == "actor":
        return pieces
    return [dataclasses.replace(piece, key=f"{name}.{piece.key}") for piece in pieces]


def _about(groups: Groups, models: Models) -> dict[str, Any]:
    """The actor's at the top, a critic's below its name."""
    found = {name: _about_model(*model) for name, model in models.items()}
    return found.pop("actor") | found | {"layout": _layout(groups)}


def _about_model(_: Any, optimizer: Any, schedule: Any) -> dict[str, Any]:
    return {
        "optimizer": optimizer is not None,
        # 0 where this rank's optimizer owns nothing
        "step": max((_steps(part) for part in optimizers(optimizer)), default=0),
        "schedule": schedule.state_dict(),
        "scalers": [_scaler(part) for part in optimizers(optimizer)],
    }


def _parts(about: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What is said of each model."""
    return {"actor": about} | ({"critic": about["critic"]} if "critic" in about else {})


def _complete(directory: Path, chunks: list[Any], about: dict[str, Any]) -> None:
    write_index(directory, chunks)
    disk.write_synced(directory / ABOUT, json.dumps(about))
    disk.write_synced(directory / "metadata.json", json.dumps(BACKEND))
    with open(directory / "common.pt", "wb") as file:
        torch.save({"content_metadata": {}}, file)


def load(
    directory: str | Path,
    models: Models,
    groups: Groups,
    random: bool = True,
    reference: Reference | None = None,
) -> None:
    """Not collective: every rank reads what it holds. A model with `optimizer` None takes weights
    only (its schedule stays new); the random state goes only into the layout that saved it. A
    critic or a `reference` stays as it is where the checkpoint has none.
    """
    metadata = _metadata(groups)
    with Stored(directory) as stored:
        try:
            about = json.loads((Path(directory) / ABOUT).read_text())
        except FileNotFoundError:
            about = {"optimizer": False, "layout": None}  # Megatron's own: weights can be read
        parts = _parts(about)
        if reference is not None:
            held = _prefixed(to_load(models["actor"].chunks, None, metadata), REFERENCE)
            if all(piece.key in stored for piece in held):
                stored.fill(held)
                reference.take()
        for name, model in models.items():
            if name in parts:
                if model.optimizer is not None and not parts[name]["optimizer"]:
                    raise ValueError(
                        f"checkpoint.load: {directory} holds no optimizer state; set "
                        "checkpoint.no_load_optim: true to start a new optimizer from its weights"
                    )
                pieces = to_load(model.chunks, model.optimizer, metadata)
                stored.fill(_prefixed(pieces, name))
        states = _random_pieces(groups)
        same = about["layout"] == _layout(groups) and all(p.key in stored for p in states)
        if random and same:
            stored.fill(states)
            _set_random(states)
    for name, model in models.items():
        if model.optimizer is not None and name in parts:
            _set_progress(model, parts[name])


def _set_progress(model: Model, about: dict[str, Any]) -> None:
    """Counts and loss scales of its optimizers, and the schedule."""
    for part, scaler in zip(optimizers(model.optimizer), about["scalers"], strict=False):
        _set_steps(part, about["step"])
        if scaler is not None:
            scale = torch.tensor([scaler["scale"]], device=part.grad_scaler._scale.device)
            part.grad_scaler.load_state_dict(scaler | {"scale": scale})
    model.schedule.load_state_dict(about["schedule"])


def _metadata(groups: Groups) -> dict[str, Any]:
    return {"dp_cp_group": groups.dp_cp}


def _layout(groups: Groups) -> list[int]:
    sizes = (groups.tp_size, groups.pp_size, groups.cp_size, groups.dp_size, groups.ep_size)
    return [*sizes, groups.etp_size]


def _steps(part: Any) -> int:
    """Adam's count of steps: torch keeps it for each parameter, TE's and Apex's for each group."""
    inner = part.optimizer
    counts = [group["step"] for group in inner.param_groups if "step" in group]
    counts += [state["step"] for state in inner.state.values() if "step" in state]
    return int(counts[0]) if counts else 0


def _set_steps(part: Any, step: int) -> None:
    for group in part.optimizer.param_groups:
        if "step" in group:
            group["step"] = step
    for state in part.optimizer.state.values():
        if "step" in state:
            state["step"].fill_(step)


def _scaler(part: Any) -> dict[str, Any] | None:
    """The state of fp16's loss scale; None in other precisions."""
    scaler = getattr(part, "grad_scaler", None)
    state = scaler.state_dict() if scaler is not None else {}
    return {k: float(v) if k == "scale" else int(v) for k, v in state.items()} or None


def _random_pieces(groups: Groups) -> list[Piece]:
    """Every generator's state on this rank, as tensors of its own."""
    at = [groups.pp_rank, groups.tp_rank, groups.cp_rank, groups.dp_rank]
    rank = "random." + ".".join(map(str, at))
    states = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    states |= {f"tracker.{name}": s for name, s in _tracker().get_states().items()}
    return [
        Piece(f"{rank}.{name}", tuple(s.shape), (0,) * s.dim(), s.clone())
        for name, s in states.items()
    ]


def _set_random(states: list[Piece]) -> None:
    tracker: dict[str, Tensor] = {}
    for piece in states:
        kind = piece.key.split(".", 5)[5]  # random, four coordinates, then which generator
        if kind == "torch":
            torch.set_rng_state(piece.values)
        elif kind == "cuda":
            torch.cuda.set_rng_state(piece.values)
        else:
            tracker[kind.removeprefix("tracker.")] = piece.values
    _tracker().set_states(tracker)


def _tracker() -> Any:
    from megatron.core import tensor_parallel

    return tensor_parallel.get_cuda_rng_tracker()

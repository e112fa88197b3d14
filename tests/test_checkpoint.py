"""Which checkpoint a run goes on from, which it refuses, and what is left when saving fails.

The trainer's part is a stand-in that writes two small files; tests/trainer and tests/whole have
the real one.
"""

from __future__ import annotations

import errno
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from spmd_rl.checkpoint import Checkpoints, State
from spmd_rl.config.schema import Config
from spmd_rl.config.stored import complete, number
from spmd_rl.control import Explained
from spmd_rl.resume import find
from tests.models import tiny_model


class Writers:
    """Two ranks that write a file each. Asynchronous ones are done when `done` is set."""

    def __init__(self):
        self.done, self.failure, self.path = True, None, Path()
        self.optimizer = True

    def begin_save(self, path: str) -> None:
        self.path = Path(path)
        for rank in (0, 1):
            (self.path / f"__{rank}_0.distcp").write_bytes(b"x" * 2_000_000)

    def saving(self) -> list[bool]:
        return [False, not self.done]

    def finish_save(self) -> list[dict]:
        (self.path / ".metadata").write_bytes(b"index")
        (self.path / "trainer.json").write_text(json.dumps({"optimizer": self.optimizer}))
        answers: list[dict] = [{"bytes": 2_000_000}, {"bytes": 2_000_000}, {}]
        if self.failure is not None:
            full = self.failure.errno == errno.ENOSPC
            answers[1] |= {"failure": str(self.failure), "full": full}
        return answers


class Run:
    """A run in `folder`, as far as checkpoints go."""

    def __init__(self, folder: Path, **sections):
        self.folder = folder
        prompts = folder / "prompts.jsonl"
        if not prompts.exists():
            prompts.write_text('{"input": "1+1"}\n')
        base = {
            "model": {"hf_checkpoint": str(tiny_model("qwen3"))},
            "data": {"prompt_data": str(prompts)},
            "rollout": {"rollout_batch_size": 2, "num_rollout": 8},
        }
        for name, values in sections.items():
            base[name] = base.get(name, {}) | values
        self.cfg = Config.model_validate(base)
        self.run_dir = folder / "run"
        self.root = self.run_dir / "checkpoints"
        self.workers = Writers()

    def find(self):
        return find(self.cfg, self.run_dir)

    def start(self) -> Checkpoints:
        start = self.find()
        state = start.state or State(num_rollout=8)
        log = SimpleNamespace(run_dir=self.run_dir, sync=lambda: None)
        return Checkpoints(self.cfg, self.workers, log, start.origin, state)  # type: ignore

    def save(self, *rollouts: int) -> Checkpoints:
        checkpoints = self.start()
        for rollout in rollouts:
            checkpoints.save(State(8, rollout, rollout, {"sample_offset": 2 * rollout}))
            checkpoints.commit()
        return checkpoints

    def kept(self) -> list[int]:
        return [number(path) for path in complete(self.root)]


def test_the_newest_is_found_and_older_ones_go(tmp_path):
    run = Run(tmp_path)
    run.save(1, 2, 3)
    assert run.kept() == [2, 3]
    start = run.find()
    assert start.state == State(8, 3, 3, {"sample_offset": 6})
    assert start.model == str(run.root / "rollout_000003" / "model")
    assert start.notes == ()


def truncate(path: Path) -> None:
    (path / "model" / "__1_0.distcp").write_bytes(b"x" * 1000)


def lose(path: Path) -> None:
    (path / "model" / "__0_0.distcp").unlink()


def scribble(path: Path) -> None:
    (path / "model" / ".metadata").write_bytes(b"i?dex")


def tear(path: Path) -> None:
    text = (path / "state.json").read_text()
    (path / "state.json").write_text(text[: len(text) // 2])


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (truncate, "model/__1_0.distcp has 1,000 of 2,000,000 bytes"),
        (lose, "model/__0_0.distcp is missing"),
        (scribble, "the content of model/.metadata has changed"),
        (tear, "its state.json cannot be read"),
    ],
)
def test_a_damaged_one_is_skipped_with_a_sentence(tmp_path, harm, says):
    run = Run(tmp_path)
    run.save(1, 2)
    harm(run.root / "rollout_000002")
    (run.root / ".rollout_000003.part" / "model").mkdir(parents=True)  # a save that was killed
    start = run.find()
    assert start.state and start.state.rollout == 1
    damaged, used = start.notes
    assert f"{run.root}/rollout_000002 is damaged" in damaged and says in damaged
    assert used == f"{run.root}/rollout_000001 is used instead"
    run.start()
    assert not list(run.root.glob(".rollout_*"))


def test_the_last_good_one_stays_until_a_new_one_is_complete(tmp_path):
    run = Run(tmp_path, checkpoint={"keep_last": 1, "async_save": True})
    checkpoints = run.save(1)
    run.workers.done = False
    checkpoints.save(State(8, 2))
    checkpoints.commit()
    assert run.kept() == [1]  # still being written
    run.workers.done = True
    checkpoints.commit()
    assert run.kept() == [2]


@pytest.mark.parametrize("async_save", [False, True])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_save_that_fails_says_so_and_leaves_the_last_good_one(tmp_path, async_save, number):
    run = Run(tmp_path, checkpoint={"async_save": async_save})
    checkpoints = run.save(1)
    run.workers.failure = OSError(number, "no")
    with pytest.raises(Explained) as failure:
        checkpoints.save(State(8, 2))
        checkpoints.commit()
    text = str(failure.value)
    assert str(run.root) in text and f"last good checkpoint is {run.root}/rollout_000001" in text
    if number == errno.ENOSPC:
        assert "no space left" in text and "needs 4,000,000 bytes" in text and "are free" in text
    assert run.kept() == [1] and not list(run.root.glob(".rollout_*"))
    assert run.find().state.rollout == 1  # type: ignore[union-attr]


def test_a_run_that_stops_early_is_saved_once(tmp_path):
    run = Run(tmp_path)
    checkpoints = run.start()
    slept = []

    class Engines:
        def asleep(self):
            slept.append(1)
            return SimpleNamespace(__enter__=None)

    checkpoints.save(State(8, 3))
    checkpoints.commit()
    checkpoints.finish(State(8, 3), Engines())  # type: ignore[arg-type]
    assert run.kept() == [3] and not slept


def test_another_configuration_is_refused(tmp_path):
    Run(tmp_path).save(2)
    changed = {"train": {"lr": 3e-4}, "algo": {"eps_clip": 0.3}}
    with pytest.raises(Explained) as failure:
        Run(tmp_path, **changed).find()
    text = str(failure.value)
    assert "algo.eps_clip 0.2 -> 0.3; train.lr 1e-06 -> 0.0003" in text
    assert "checkpoint.allow_changed_keys=[algo.eps_clip, train.lr]" in text
    allowed = {"allow_changed_keys": ["train.lr", "algo.eps_clip"]}
    assert Run(tmp_path, **changed, checkpoint=allowed).find().state


def test_what_may_change_on_the_way(tmp_path):
    Run(tmp_path).save(2)
    run = Run(
        tmp_path,
        rollout={"num_rollout": 20, "rollout_request_timeout": 60.0},
        placement={"colocate": True},
        train={"max_tokens_per_gpu": 512, "use_dynamic_batch_size": True},
        checkpoint={"save_interval": 5},
        debug={"ci_test": True},
        sglang={"mem_fraction_static": 0.5},
        megatron={"tensor_model_parallel_size": 2},
    )
    assert run.find().state.rollout == 2  # type: ignore[union-attr]


def test_other_data_is_refused_wherever_it_lies(tmp_path):
    Run(tmp_path).save(2)
    moved = tmp_path / "elsewhere.jsonl"
    moved.write_text((tmp_path / "prompts.jsonl").read_text())
    assert Run(tmp_path, data={"prompt_data": str(moved)}).find().state
    moved.write_text('{"input": "1+2"}\n')
    with pytest.raises(Explained, match="the content of data.prompt_data is another"):
        Run(tmp_path, data={"prompt_data": str(moved)}).find()


def test_another_model_is_refused_even_for_its_weights(tmp_path):
    Run(tmp_path).save(2)
    other = {"hf_checkpoint": str(tiny_model("qwen3", hidden=32))}
    checkpoint = {"load": str(tmp_path / "run" / "checkpoints"), "finetune": True}
    with pytest.raises(Explained, match="another model .*hidden_size 64 -> 32"):
        Run(tmp_path, model=other, checkpoint=checkpoint).find()


class TestLoad:
    """`checkpoint.load` names where a run begins; from then on its restarts go on by themselves."""

    @pytest.fixture
    def source(self, tmp_path: Path) -> Path:
        (tmp_path / "a").mkdir()
        run = Run(tmp_path / "a")
        run.save(2, 4)
        return run.root

    def other(self, tmp_path: Path, source: Path | str, **checkpoint) -> Run:
        (tmp_path / "b").mkdir(exist_ok=True)
        data = {"prompt_data": str(tmp_path / "a" / "prompts.jsonl")}
        return Run(tmp_path / "b", data=data, checkpoint={"load": str(source)} | checkpoint)

    def test_goes_on_from_it_then_from_its_own(self, tmp_path, source):
        run = self.other(tmp_path, source, ckpt_step=2)
        assert run.find().state.rollout == 2
        run.save(3)
        assert run.find().state.rollout == 3  # the same command again, after a kill
        assert self.other(tmp_path, source, ckpt_step=4).find().state.rollout == 4

    def test_weights_alone(self, tmp_path, source):
        run = self.other(tmp_path, source, finetune=True)
        start = run.find()
        assert start.state is None and start.model == f"{source}/rollout_000004/model"
        assert not start.optimizer and not start.random
        run.save(1)
        again = run.find()
        assert again.state.rollout == 1 and again.optimizer and again.random

    def test_without_optimizer_or_random_state(self, tmp_path, source):
        start = self.other(tmp_path, source, no_load_optim=True, no_load_rng=True).find()
        assert start.state.rollout == 4 and not start.optimizer and not start.random

    def test_no_optimizer_there(self, tmp_path, source):
        run = self.other(tmp_path, tmp_path / "b" / "run" / "checkpoints")
        run.workers.optimizer = False
        with pytest.raises(Explained, match="no_load_optim=true"):
            run.save(1, 2)
            run.find()
        checkpoint = {"no_save_optim": True, "save": str(run.root)}
        assert (
            not Run(tmp_path / "b", data=run.cfg.data.model_dump(), checkpoint=checkpoint)
            .find()
            .optimizer
        )

    def test_a_step_that_is_not_there(self, tmp_path, source):
        with pytest.raises(Explained, match="no checkpoint after 3 rollouts; there are: 2, 4"):
            self.other(tmp_path, source, ckpt_step=3).find()

    def test_nothing_there(self, tmp_path, source):
        empty = tmp_path / "empty"
        empty.mkdir()
        start = self.other(tmp_path, empty).find()
        assert start.state is None and start.model is None
        assert "holds no checkpoint: the run begins with" in start.notes[-1]
        with pytest.raises(Explained, match="holds no checkpoint: name another directory"):
            self.other(tmp_path, empty, exit_on_missing_checkpoint=True).find()

    def test_a_hugging_face_directory(self, tmp_path, source):
        model = tiny_model("qwen3", perturb=0.2)
        start = self.other(tmp_path, model).find()
        assert start.weights == str(model) and start.state is None
        with pytest.raises(Explained, match="another model"):
            self.other(tmp_path, tiny_model("qwen3", hidden=32)).find()


def test_an_older_program_s_unknown_keys_count_as_their_defaults(tmp_path):
    run = Run(tmp_path)
    run.save(2)
    file = run.root / "rollout_000002" / "state.json"
    about = json.loads(file.read_text())
    del about["configuration"]["keys"]["algo.eps_clip_c"]
    file.write_text(json.dumps(about))
    assert run.find().state
    with pytest.raises(Explained, match="algo.eps_clip_c None -> 3.0"):
        Run(tmp_path, algo={"eps_clip_c": 3.0}).find()

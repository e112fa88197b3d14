"""The command line: sizes from the launcher or the words, faults on standard error, status 2."""

from __future__ import annotations

from pathlib import Path

import pytest

from spmd_rl import cli
from tests.config.inputs import good, write


@pytest.fixture(autouse=True)
def by_hand(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)


def torchrun(monkeypatch, rank: int, world: int) -> None:
    for name, value in (("RANK", rank), ("WORLD_SIZE", world), ("LOCAL_WORLD_SIZE", world)):
        monkeypatch.setenv(name, str(value))


def test_sizes_come_from_the_launcher(tmp_path: Path, monkeypatch):
    path = str(write(tmp_path, good(tmp_path)))
    assert cli.parse(["--config", path]).placement.world == 1
    assert cli.parse(["--config", path, "lr=1", "--dry-run", "eps_clip=1"]).dry_run
    torchrun(monkeypatch, 0, 4)
    assert cli.parse(["--config", path]).placement.train_ranks == (0, 1, 2, 3)
    planned = cli.parse(["--config", path, "--dry-run", "--world", "8", "--ranks-per-node", "2"])
    assert (planned.placement.world, planned.placement.ranks_per_node) == (8, 2)


def test_overrides_may_stand_anywhere(tmp_path: Path):
    path = str(write(tmp_path, good(tmp_path)))
    args = cli.parse(["lr=2", "--config", path, "--num-rollout=5", "gamma=0.5"])
    assert (args.cfg.train.lr, args.cfg.rollout.num_rollout, args.cfg.algo.gamma) == (2, 5, 0.5)


def test_world_is_for_planning(tmp_path: Path, capsys):
    path = str(write(tmp_path, good(tmp_path)))
    with pytest.raises(SystemExit) as end:
        cli.parse(["--config", path, "--world", "4"])
    assert end.value.code == 2
    assert "add --dry-run" in capsys.readouterr().err


def test_another_rank_prints_only_what_rank_0_did_not_end(tmp_path: Path, monkeypatch, capsys):
    """It outlives its patience when the fault is its own node's: then it must be said."""
    torchrun(monkeypatch, 1, 2)
    monkeypatch.setattr(cli, "PATIENCE", 0)
    with pytest.raises(SystemExit):
        cli.parse(["--config", str(tmp_path / "none.yaml")])
    assert capsys.readouterr().err.startswith("rank 1 on ")


def test_only_rank_0_prints_the_plan(tmp_path: Path, monkeypatch, capsys):
    path = str(write(tmp_path, good(tmp_path)))
    torchrun(monkeypatch, 1, 2)
    cli.print_plan(cli.parse(["--config", path, "--dry-run"]))
    assert capsys.readouterr().out == ""

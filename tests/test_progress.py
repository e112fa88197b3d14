"""What a run shows: plain lines away from a terminal, a live bar on one."""

import io

from spmd_rl.progress import Progress, clock
from tests.test_metrics import config

VALUES = {
    "rollout/raw_reward": 0.634,
    "rollout/response_len/mean": 18.0,
    "train/loss": [0.25, 0.35],
    "train/kl_loss": 0.0012,
    "perf/step_time": 4.0,
    "perf/collect_time": 2.0,
    "perf/train_time": 1.5,
    "perf/update_weights_time": 0.5,
}


def test_plain_lines(capsys):
    progress = Progress(config(progress="plain"), num_rollout=50, start_rollout=10)
    progress.phase("collect")
    progress.evaluation(9, {"eval/sums": 0.5, "eval/sums-truncated_ratio": 0.0})
    progress.rollout(10, VALUES)
    progress.close()
    assert capsys.readouterr().out.splitlines() == [
        "after 10 rollouts: eval/sums 0.500",
        "rollout 11/50 | reward 0.634 | kl 1.20e-03 | length 18.0 | 36 tok/s"
        " | 4.0 s (collect 2.0, train 1.5, push 0.5) | eta 2:36",
    ]


def test_sft_shows_its_loss(capsys):
    cfg = config(progress="plain")
    cfg.algo.loss_type = "sft_loss"
    progress = Progress(cfg, num_rollout=1)
    progress.rollout(0, VALUES)
    assert capsys.readouterr().out.startswith("rollout 1/1 | loss 0.3000 | kl")


def test_auto_is_plain_without_a_terminal(capsys):
    assert Progress(config(progress="auto"), num_rollout=1).live is None


def test_live_bar_keeps_said_lines_and_the_log_gets_all():
    screen, log = io.StringIO(), []
    progress = Progress(config(progress="rich"), 2, terminal=screen, log_only=log.append)
    progress.phase("train")
    progress.rollout(0, VALUES)
    progress.say("[saved] at rollout 1")
    progress.rollout(1, VALUES)
    progress.close()
    assert "[saved] at rollout 1" in screen.getvalue()
    assert "rollout 2/2" in screen.getvalue()
    assert [line.split(" | ")[0] for line in log] == [
        "rollout 1/2",
        "[saved] at rollout 1",
        "rollout 2/2",
    ]


def test_clock():
    assert [clock(s) for s in (0, 59.6, 187, 3723)] == ["0:00", "1:00", "3:07", "1:02:03"]

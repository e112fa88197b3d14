"""pass@k, overrides and data sets of an evaluation."""

from math import comb

import numpy as np
import pytest

from spmd_rl.config.evaluation import named
from spmd_rl.rollout.evaluate import pass_at_k
from tests.rollout.collecting import config, in_this_process, sums, write_rows
from tests.stub_engine import Answer, stub_engine

HOOKS = "tests.rollout.user_hooks"


@pytest.mark.parametrize(
    ("n", "right", "expected"),
    [
        (8, 2, {1: 0.25, 2: 0.464286, 4: 0.785714, 8: 1.0}),
        (4, 1, {1: 0.25, 2: 0.5, 4: 1.0}),
        (3, 0, {1: 0.0, 2: 0.0}),
        (6, 6, {1: 1.0, 2: 1.0, 4: 1.0}),
        (1, 1, {}),
    ],
)
def test_pass_at_k(n, right, expected):
    found = pass_at_k(np.array([[1.0] * right + [0.0] * (n - right)]))
    assert found == pytest.approx(expected, abs=1e-6)


def test_pass_at_k_is_the_share_of_subsets_and_a_mean_over_prompts():
    rewards = np.array([[1, 0, 1, 0, 0, 0], [0, 0, 0, 0.5, 0, 0], [1, 1, 1, 1, 0, 0]])
    for k, value in pass_at_k(rewards).items():
        misses = [comb(6 - right, k) / comb(6, k) for right in (2, 0, 4)]
        assert value == pytest.approx(1 - np.mean(misses))


def test_data_sets():
    assert named(["x.jsonl"]) == {"aime": "x.jsonl"}
    assert named(["a", "x", "b", "y@[0:3]"]) == {"a": "x", "b": "y@[0:3]"}


def test_overrides_reach_the_engine(tmp_path):
    """Half of the answers of the second set are cut off; its columns have other names."""
    other = [{"question": row["prompt"], "answer": row["label"]} for row in sums(6)]
    path = write_rows(tmp_path / "eval.jsonl", other)

    def answer(number, body):
        seed = body["sampling_params"]["sampling_seed"]
        return Answer(text=r"\boxed{0}", finish="length" if seed % 2 else "stop")

    evaluation = {
        "eval_interval": 1,
        "eval_prompt_data": ["sums", str(path)],
        "eval_input_key": "question",
        "eval_label_key": "answer",
        "eval_temperature": 0.0,
        "eval_top_p": 0.5,
        "eval_top_k": 7,
        "eval_max_response_len": 3,
        "n_samples_per_eval_prompt": 2,
        "log_passrate": True,
    }
    with stub_engine(answer) as engine:
        metrics = in_this_process(config(tmp_path, eval=evaluation), engine.addresses, True)
    assert len(engine.requests) == 12
    sampling = [request["sampling_params"] for request in engine.requests]
    assert {(s["temperature"], s["top_p"], s["top_k"], s["max_new_tokens"]) for s in sampling} == {
        (0.0, 0.5, 7, 3)
    }
    assert sorted(s["sampling_seed"] for s in sampling) == [42 + i for i in range(12)]
    assert metrics["eval/sums"] == pytest.approx(1 / 6)  # "What is 0+0?" alone
    assert metrics["eval/sums-pass@1"] == metrics["eval/sums-pass@2"] == pytest.approx(1 / 6)
    assert metrics["eval/sums-truncated_ratio"] == 0.5
    assert metrics["eval/sums/response_len/mean"] == 3.0


def test_several_samples_of_a_custom_function_count_as_one_answer(tmp_path):
    path = write_rows(tmp_path / "eval.jsonl", sums(4))
    rollout = {"custom_generate_function_path": "tests.rollout.user_hooks.fan_out"}
    evaluation = {"eval_interval": 1, "eval_prompt_data": [str(path)], "log_passrate": True}
    cfg = config(tmp_path, rollout=rollout, eval=evaluation)
    with stub_engine() as engine:
        assert in_this_process(cfg, engine.addresses, True)["eval/aime"] == 8.0


EACH = """\
eval:
  defaults: {n_samples_per_eval_prompt: 2, max_response_len: 3, stop: ["!"]}
  datasets:
    - {name: many, path: "PATH@[:3]", n_samples_per_eval_prompt: 4, temperature: 0.5}
    - name: other
      path: PATH
      max_response_len: 5
      min_new_tokens: 2
      repetition_penalty: 1.25
      rm_type: boxed_f1
      metadata_overrides: {note: seen}
      custom_generate_function_path: tests.rollout.user_hooks.noted
"""


def test_each_data_set_has_settings_of_its_own(tmp_path):
    """pass@k counts the samples of its data set: slime's takes one number for all."""
    path = write_rows(tmp_path / "eval.jsonl", sums(5))
    file = tmp_path / "eval.yaml"
    file.write_text(EACH.replace("PATH", str(path)))
    evaluation = {"eval_interval": 1, "eval_config": str(file), "log_passrate": True}
    cfg = config(tmp_path, eval=evaluation, reward={"custom_rm_path": f"{HOOKS}.reward_by_index"})
    with stub_engine(lambda number, body: Answer(text=r"\boxed{2}")) as engine:
        metrics = in_this_process(cfg, engine.addresses, True)
    asked = [request["sampling_params"] for request in engine.requests]
    many = [params for params in asked if params["temperature"] == 0.5]
    other = [params for params in asked if params["temperature"] == 1.0]
    assert (len(many), len(other)) == (12, 10)
    assert {params["max_new_tokens"] for params in many} == {3}
    assert {params["max_new_tokens"] for params in other} == {5}
    assert {params["min_new_tokens"] for params in other} == {2}
    assert {params["repetition_penalty"] for params in other} == {1.25}
    assert all(params["stop"] == ["!"] for params in asked)
    assert [name for name in metrics if "pass@" in name] == [
        *(f"eval/many-pass@{k}" for k in (1, 2, 4)),
        *(f"eval/other-pass@{k}" for k in (1, 2)),
    ]
    assert metrics["eval/many"] == 0.5  # the run's function
    assert metrics["eval/other"] == 0.2  # the built-in reward: "What is 1+1?" alone

"""The collector process: what it asks of engines, and how it fails."""

import os
import time
from pathlib import Path

import numpy as np
import pytest

from spmd_rl.rollout.answers import EngineError
from spmd_rl.rollout.collector import CollectorError
from tests.rollout.collecting import collecting, config, in_this_process, sums
from tests.stub_engine import KEY, Addresses, Answer, stub_engine

HERE = "tests.rollout.user_hooks"


@pytest.fixture
def ask(tmp_path):
    """Collects one rollout from a stub engine in this process; the engine and the rollout."""

    def ask(answer=lambda number, body: Answer(), **sections):
        with stub_engine(answer) as engine:
            return engine, in_this_process(config(tmp_path, **sections), engine.addresses)

    return ask


@pytest.fixture
def run(tmp_path):
    """Collects `count` rollouts from a stub engine; the engine and the rollouts."""

    def run(answer=lambda number, body: Answer(), count=1, rows=None, state=None, **sections):
        with stub_engine(answer) as engine:
            cfg = config(tmp_path, rows, **sections)
            with collecting(cfg, tmp_path, engine.addresses) as collector:
                if state is not None:
                    collector.load_state(state)
                rollouts = [collector.collect(k, version=1) for k in range(count)]
        return engine, rollouts

    return run


def test_what_is_asked_of_an_engine(ask):
    engine, rollout = ask(rollout={"rollout_temperature": 0.7, "rollout_stop": ["END"]})
    assert engine.keys == {f"Bearer {KEY}"}
    assert len(engine.requests) == 8
    body = engine.requests[0]
    assert body["return_logprob"] is True
    sampling = body["sampling_params"]
    assert sampling["temperature"] == 0.7 and sampling["stop"] == ["END"]
    assert sampling["max_new_tokens"] == 8 and sampling["no_stop_trim"] is True
    seeds = sorted(request["sampling_params"]["sampling_seed"] for request in engine.requests)
    assert seeds == [42 + index for index in range(8)]
    assert rollout.batch.tokens[: len(body["input_ids"])].tolist() in [
        request["input_ids"] for request in engine.requests
    ]
    assert engine.aborts == 0


def test_completion_order_changes_nothing(run):
    """Same seed: same samples, same order, same state, whichever answer comes first."""

    def like_this(slow):
        def answer(number, body):
            seed = body["sampling_params"]["sampling_seed"]
            return Answer(tokens=seed % 5 + 1, delay=0.05 if slow(seed) else 0.0)

        return answer

    shuffled = {"rollout_shuffle": True}
    _, one = run(like_this(lambda seed: seed % 2), count=3, data=shuffled)
    _, other = run(like_this(lambda seed: seed % 3), count=3, data=shuffled)
    for mine, theirs in zip(one, other, strict=True):
        for name in ("tokens", "response_lengths", "rewards", "rollout_ids", "weight_versions"):
            np.testing.assert_array_equal(getattr(mine.batch, name), getattr(theirs.batch, name))
        assert mine.state == theirs.state


def test_resuming_from_a_state_gives_the_rollouts_that_would_have_followed(run):
    shuffled = {"rollout_shuffle": True}
    _, whole = run(count=4, data=shuffled)
    _, rest = run(count=2, data=shuffled, state=whole[1].state)
    for mine, theirs in zip(rest, whole[2:], strict=True):
        np.testing.assert_array_equal(mine.batch.tokens, theirs.batch.tokens)
        np.testing.assert_array_equal(mine.batch.rollout_ids, theirs.batch.rollout_ids)


def test_finish_reasons(ask):
    _, rollout = ask(lambda number, body: Answer(finish="length", tokens=8))
    assert rollout.batch.truncated.tolist() == [1] * 8
    assert rollout.metrics["rollout/truncated_ratio"] == 1.0


@pytest.mark.parametrize(
    ("together", "most"), [({"group_requests": False}, 3), ({"group_requests": True}, 2)]
)
def test_concurrency_is_limited_per_engine(ask, together, most):
    engine, _ = ask(
        lambda number, body: Answer(delay=0.02),
        rollout={"sglang_server_concurrency": 3, "rollout_batch_size": 8} | together,
    )
    assert engine.most_in_flight == most


def test_surplus_is_cancelled_and_aborted(ask):
    """Two of six groups never end; the rollout does, and their requests are gone."""

    def answer(number, body):
        index = body["sampling_params"]["sampling_seed"] - 42
        return Answer(hold=index >= 8)

    engine, rollout = ask(answer, rollout={"over_sampling_batch_size": 6})
    assert rollout.batch.rollout_ids.tolist() == list(range(8))
    assert engine.aborts == 1
    assert engine.cancelled == 4 and engine.in_flight == 0


def test_samples_are_sent_together_or_one_by_one(ask):
    """Sixteen of one prompt in one request; the same samples come back either way."""

    def answer(number, body):
        return Answer(tokens=body["sampling_params"]["sampling_seed"] % 5 + 1)

    many = {"rollout_batch_size": 4, "n_samples_per_prompt": 16}
    engine, together = ask(answer, rollout=many)
    other, single = ask(answer, rollout=many | {"group_requests": False})
    assert (engine.posts, other.posts) == (4, 64)
    np.testing.assert_array_equal(together.batch.tokens, single.batch.tokens)
    few, _ = ask(answer)  # 8 samples: every engine gets several requests first
    assert few.posts == 4


def test_the_context_limits_the_response(ask):
    engine, rollout = ask(
        lambda number, body: Answer(tokens=100, finish="length"),
        rollout={"rollout_max_context_len": 24, "rollout_max_response_len": 100},
    )
    assert set(rollout.batch.total_lengths) == {24}


def test_aborts_nobody_asked_for_are_tried_again(ask):
    def answer(number, body):
        return Answer(finish="abort" if number < 3 else "stop")

    engine, rollout = ask(answer)
    assert len(engine.requests) == 11 and len(rollout.batch) == 8


def test_an_overloaded_router_is_asked_again(ask):
    engine, rollout = ask(lambda number, body: Answer(status=503 if number < 3 else 200))
    assert engine.posts > len(engine.requests) - len(rollout.batch) > 0


def test_a_refusal_is_told(ask):
    with pytest.raises(EngineError, match="answered 400: stub refuses"):
        ask(lambda number, body: Answer(status=400))


def test_a_request_has_a_time_limit(ask):
    with pytest.raises(EngineError, match="within 0.5 s .rollout.rollout_request_timeout"):
        ask(lambda number, body: Answer(hold=True), rollout={"rollout_request_timeout": 0.5})


def test_an_engine_that_is_not_there_is_named(tmp_path):
    gone = Addresses(["http://127.0.0.1:1"], "http://127.0.0.1:1", "")
    with pytest.raises(EngineError, match=r"engine 0 \(http://127.0.0.1:1\) cannot be reached"):
        in_this_process(config(tmp_path), gone)


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"reward": {"custom_rm_path": f"{HERE}.raising_reward"}}, "the user's own mistake"),
        (
            {"rollout": {"custom_generate_function_path": f"{HERE}.raising_generate"}},
            "ZeroDivision",
        ),
    ],
)
def test_user_code_that_raises_is_told_with_its_traceback(run, section, words):
    with pytest.raises(CollectorError, match=words) as caught:
        run(**section)
    assert "user_hooks.py" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("exiting_reward", "last words of the user's code\n.*ended with exit status 7$"),
        ("killed_reward", "killed by SIGKILL .out of memory"),
        ("forking_reward", "ended with exit status 3"),
    ],
)
def test_the_death_of_the_process_is_told_within_a_second(run, name, words):
    ended = []

    def answer(number, body):
        ended.append(time.monotonic())
        return Answer()

    with pytest.raises(CollectorError, match=words):
        run(answer, reward={"custom_rm_path": f"{HERE}.{name}"})
    assert time.monotonic() - ended[-1] < 3  # 1 s, and what the stub engine takes to end


def test_bad_data_is_a_sentence(tmp_path):
    rows = [*sums(2), {"question": "x"}]
    with (
        pytest.raises(ValueError, match="line 3: no 'prompt' .data.input_key.") as caught,
        collecting(config(tmp_path, rows), tmp_path) as collector,
    ):
        collector.num_prompts  # noqa: B018
    assert "Traceback" not in str(caught.value)


def test_what_was_dropped_is_said(tmp_path, capsys):
    rows = [*sums(3), {"prompt": "9" * 200, "label": "1"}]
    cfg = config(tmp_path, rows, data={"rollout_max_prompt_len": 100})
    with collecting(cfg, tmp_path) as collector:
        assert collector.num_prompts == 3
    assert "1 of 4 prompts are longer than 100 tokens" in capsys.readouterr().out


def test_it_starts_light_and_ends_with_rank_0(tmp_path):
    began = time.monotonic()
    with collecting(config(tmp_path), tmp_path) as collector:
        assert collector.num_prompts == 32
        took = time.monotonic() - began
        maps = Path(f"/proc/{collector.pid}/maps").read_text()
        pid = collector.pid
    assert "libtorch" not in maps
    assert took < 15  # 1.4 s on a quiet machine
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)

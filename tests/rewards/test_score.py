"""Which verifier is asked, and a remote one that fails at first."""

import asyncio

import pytest
from aiohttp import web

from spmd_rl.config.schema import Config
from spmd_rl.rewards.remote import RemoteReward
from spmd_rl.rewards.score import Scorer
from spmd_rl.types import Sample, Status


def scored(samples, **reward):
    cfg = Config.model_validate(
        {
            "model": {"hf_checkpoint": "x"},
            "rollout": {"rollout_batch_size": 1},
            "reward": reward,
        }
    )

    async def score():
        scorer = Scorer(cfg)
        await scorer.group(samples)
        await scorer.close()
        return [sample.reward for sample in samples]

    return asyncio.run(score())


def answered(text, label="72", **values):
    return Sample(response=text, label=label, status=Status.COMPLETED, **values)


def test_each_type():
    box = r"<think>x</think>\boxed{72}"
    assert scored([answered(box)], rm_type="math") == [1]
    assert scored([answered(box)], rm_type="deepscaler") == [1]
    assert scored([answered("Answer: 72")], rm_type="dapo")[0]["score"] == 1.0
    assert scored([answered("seventy two", "seventy two")], rm_type="f1") == [1.0]
    assert scored([answered("Answer: B", "B")], rm_type="gpqa") == [1.0]
    assert scored([answered(r"so \boxed{the tower}", "tower")], rm_type="boxed_f1") == [1.0]


def test_types_that_judge_by_the_row():
    follows = {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    assert scored([answered("no", metadata=follows)], rm_type="ifbench") == [1.0]
    assert scored([answered("<think>a</think><answer>b</answer>")], rm_type="format") == [1.0]
    program = answered(
        "```python\nprint(int(input()) + 1)\n```", {"inputs": ["1"], "outputs": ["2"]}
    )
    assert scored([program], rm_type="code") == [1.0]


def half(args, sample, **kwargs):
    return 0.5


def test_your_own_function_comes_before_all_types():
    sample = answered("72", metadata={"rm_type": "f1"})
    assert scored([sample], rm_type="math", custom_rm_path=f"{__name__}:half") == [0.5]


def test_random_is_the_same_in_every_run():
    samples = [answered("", index=index) for index in range(200)]
    first = scored(samples, rm_type="random")
    again = scored([answered("", index=index) for index in range(200)], rm_type="random")
    assert first == again and set(first) == {0, 1} and 60 < sum(first) < 140


def test_a_samples_own_type_comes_first():
    sample = answered("72", metadata={"rm_type": "f1"})
    assert scored([sample], rm_type="math") == [1.0]


def test_rewards_that_are_there_stay_and_aborted_samples_get_none():
    kept, aborted = answered("x", reward=0.25), answered(r"\boxed{72}")
    aborted.status = Status.ABORTED
    assert scored([kept, aborted], rm_type="math") == [0.25, None]


@pytest.mark.parametrize(
    ("reward", "words"),
    [
        ({"rm_type": "maths"}, "rm_type 'maths' is unknown: choose one of math, deepscaler"),
        ({"rm_type": "remote_rm"}, "remote_rm needs reward.rm_url"),
        ({}, "nothing rewards the samples: set reward.rm_type or reward.custom_rm_path"),
        ({"custom_rm_path": "nowhere.at:all"}, "there is no module nowhere.at"),
        ({"custom_rm_path": "tests.rollout.user_hooks:no"}, "has no function no"),
        ({"custom_rm_path": "name"}, "write package.module:function"),
    ],
)
def test_faults(reward, words):
    with pytest.raises(ValueError, match=words):
        scored([answered("x")], **reward)


def test_a_remote_reward_is_asked_again():
    asked = []

    async def judge(request):
        asked.append(await request.json())
        if len(asked) < 3:
            return web.Response(status=500)
        return web.json_response({"score": 0.5})

    async def run():
        app = web.Application()
        app.router.add_post("/judge", judge)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        remote = RemoteReward(f"{site.name}/judge", first_pause=0.001)
        reward = await remote("p", "r", "l")
        await remote.close()
        await runner.cleanup()
        return reward

    assert asyncio.run(run()) == {"score": 0.5}
    assert asked == [{"prompt": "p", "response": "r", "label": "l"}] * 3


def test_a_remote_reward_that_never_answers_ends_the_run_with_a_sentence(monkeypatch):
    pauses = []

    async def pause(seconds):
        pauses.append(seconds)

    async def run():
        remote = RemoteReward("http://127.0.0.1:1/judge")
        monkeypatch.setattr("spmd_rl.rewards.remote.asyncio.sleep", pause)
        try:
            await remote("p", "r", "l")
        finally:
            await remote.close()

    with pytest.raises(
        RuntimeError, match="reward.rm_url http://127.0.0.1:1/judge failed 10 times"
    ):
        asyncio.run(run())
    bases = [1, 2, 4, 8, 16, 30, 30, 30, 30]
    assert len(pauses) == len(bases)
    assert all(base <= seconds < base + 1 for base, seconds in zip(bases, pauses, strict=True))

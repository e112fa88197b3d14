#!/usr/bin/env python3
"""What the agent gateway adds to the time an engine needs for conversations.

One CPU engine with the quickstart's model holds the same two-turn conversations, all at once, in
turns: through the gateway (messages, templates, records, parsers of tool calls), and from a bare
client that posts the very requests the gateway sent and reads the bytes that come back. Prints a
table and, last, one JSON object; exits 1 when the median ratio over the rounds is above 1.10.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import aiohttp  # noqa: E402
import orjson  # noqa: E402

from spmd_rl.agent.gateway import Session  # noqa: E402
from spmd_rl.config.schema import Config  # noqa: E402
from spmd_rl.rollout.admin import EngineAdmin  # noqa: E402
from spmd_rl.rollout.engines import EngineHost  # noqa: E402
from spmd_rl.rollout.fleet import EngineAddresses  # noqa: E402
from spmd_rl.rollout.generate import sampling_params, use  # noqa: E402
from spmd_rl.rollout.service import Service  # noqa: E402
from spmd_rl.types import EngineSpec, Sample  # noqa: E402
from tools.make_tiny_model import make_tiny_model  # noqa: E402

GOAL = 1.10
KEY = "key-of-the-bench"
TOOL = {
    "type": "function",
    "function": {"name": "add", "parameters": {"type": "object", "properties": {}}},
}
Requests = list[list[bytes]]  # of each conversation: the bodies of its turns


def configuration(folder: Path, length: int) -> Config:
    make_tiny_model(folder / "model", positions=4096)
    (folder / "rows.jsonl").write_text('{"input": "unused"}\n')
    return Config.model_validate(
        {
            "placement": {"device": "cpu"},
            "model": {"hf_checkpoint": str(folder / "model")},
            "data": {"prompt_data": str(folder / "rows.jsonl")},
            "rollout": {"rollout_batch_size": 1, "rollout_max_response_len": 4 * length},
            "sglang": {"tool_call_parser": "qwen25"},
        }
    )


async def through_gateway(
    cfg: Config, http: aiohttp.ClientSession, count: int, length: int, tools: bool
) -> tuple[float, Requests]:
    """Seconds, and the requests that reached the engine."""
    # Every answer has its full length: the work is the same in each round.
    sampling = sampling_params(cfg) | {"ignore_eos": True}
    sessions = [
        Session(cfg, Sample(index=i), sampling | {"sampling_seed": i}) for i in range(count)
    ]

    async def converse(number: int, session: Session) -> None:
        messages: list[Any] = [{"role": "user", "content": f"What is {number}+{number % 7}?"}]
        async with session as agent:
            headers = {"Authorization": f"Bearer {agent.key}"}
            for _ in range(2):
                body = {"model": "policy", "messages": messages, "max_tokens": length}
                body |= {"tools": [TOOL]} if tools else {}
                url = f"{agent.base_url}/v1/chat/completions"
                async with http.post(url, json=body, headers=headers) as response:
                    assert response.status == 200, await response.text()
                    answer = orjson.loads(await response.read())
                messages.append(answer["choices"][0]["message"])
                messages.append({"role": "user", "content": "Are you sure?"})

    began = time.perf_counter()
    await asyncio.gather(*(converse(i, session) for i, session in enumerate(sessions)))
    seconds = time.perf_counter() - began
    sent = []
    for session in sessions:
        assert [len(turn.path()) for turn in session.record.all] == [1, 2]
        options = session.sampling | {"max_new_tokens": length}
        sent.append([_body(turn.prompt, options) for turn in session.record.all])
    return seconds, sent


def _body(tokens: list[int], sampling: dict[str, Any]) -> bytes:
    return orjson.dumps({"input_ids": tokens, "sampling_params": sampling, "return_logprob": True})


async def direct(url: str, http: aiohttp.ClientSession, requests: Requests) -> float:
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}

    async def converse(bodies: list[bytes]) -> None:
        for body in bodies:
            async with http.post(f"{url}/generate", data=body, headers=headers) as response:
                assert response.status == 200, await response.text()
                await response.read()

    began = time.perf_counter()
    await asyncio.gather(*map(converse, requests))
    return time.perf_counter() - began


async def measure(cfg: Config, url: str, args: argparse.Namespace) -> list[tuple[float, float]]:
    """(gateway, direct) of each round, each with an empty prefix cache; the first is dropped."""
    admin, service = EngineAdmin(url, KEY), Service(cfg)
    await service.connect(EngineAddresses([url], url, KEY))
    assert service.generator
    use(service.generator)
    found = []
    requests: Requests = []
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=600)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as http:
        for number in range(args.rounds + 1):
            pair = {}
            for name in (
                ("gateway", "direct") if number % 2 or not number else ("direct", "gateway")
            ):
                admin.flush()
                if name == "gateway":
                    pair[name], requests = await through_gateway(
                        cfg, http, args.conversations, args.length, args.tools
                    )
                else:
                    pair[name] = await direct(url, http, requests)
            if number:
                found.append((pair["gateway"], pair["direct"]))
                print(f"round {number}: {found[-1][0]:.3f} s, direct {found[-1][1]:.3f} s")
    await service.close()
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--conversations", type=int, default=64)
    parser.add_argument("--length", type=int, default=128, help="new tokens of a turn")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tools", action="store_true", help="look for calls of tools in answers")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cfg = configuration(folder, args.length)
        spec = EngineSpec(index=0, ranks=(0,), host_rank=0, base_gpu_id=0)
        host = EngineHost(cfg, [spec], folder, SimpleNamespace(host="127.0.0.1"), KEY)
        try:
            host.launch()
            [(_, url)] = host.wait_ready()
            found = asyncio.run(measure(cfg, url, args))
        finally:
            host.stop()
    ratio = statistics.median(ours / bare for ours, bare in found)
    result = {
        "bench": "agent",
        "seconds": round(statistics.median(ours for ours, _ in found), 3),
        "direct_seconds": round(statistics.median(bare for _, bare in found), 3),
        "ratio": round(ratio, 4),
        "goal": GOAL,
    }
    print(json.dumps(result))
    return 0 if ratio <= GOAL else 1


if __name__ == "__main__":
    sys.exit(main())

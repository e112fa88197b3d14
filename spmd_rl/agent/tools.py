"""Calls of tools: read from an answer by SGLang's own parsers, run with a time limit.

Comes in: an answer's text and the tools' schemas; goes out: the calls, and what the tools said. The
parsers run in the engines, which have SGLang loaded: importing it here takes 5 s and 400 MB. A
tool that fails is an observation for the model, not an end of the run.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple
from uuid import uuid4

from spmd_rl import hooks
from spmd_rl.config.schema import Config
from spmd_rl.data.rows import DataError
from spmd_rl.rollout.generate import current

MOST_TEXT = 20_000  # characters of a tool's answer that are shown


class ToolCall(NamedTuple):
    """What the model wants a tool to do."""

    id: str
    name: str
    arguments: str  # JSON, as the model wrote it

    def message_part(self) -> dict[str, Any]:
        """As chat messages have it."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.id, "type": "function", "function": function}

    def answered(self, text: str) -> dict[str, Any]:
        """The message that tells the model what the tool said."""
        return {"role": "tool", "content": text, "tool_call_id": self.id, "name": self.name}


async def read_calls(args: Config, text: str, tools: list) -> tuple[str, list[ToolCall]]:
    """An answer's text without its calls, and the calls. A call of a tool that is not among `tools`
    stays text."""
    parser = args.sglang.get("tool_call_parser")
    if not parser:
        raise DataError(
            "a conversation has tools, but nothing says how the model writes calls: set "
            "sglang.tool_call_parser, as qwen25, hermes or llama3"
        )
    body = {"text": text, "tools": tools, "tool_call_parser": parser}
    answer = await current().client.ask_any("/parse_function_call", body)
    calls = [
        ToolCall(f"call_{uuid4().hex[:24]}", call["name"], call["parameters"])
        for call in answer["calls"]
    ]
    return answer["normal_text"], calls


async def read_thoughts(args: Config, text: str) -> tuple[str, str]:
    """What the model thought, and what it said; without sglang.reasoning_parser it said all."""
    parser = args.sglang.get("reasoning_parser")
    if not parser:
        return "", text
    body = {"text": text, "reasoning_parser": parser}
    answer = await current().client.ask_any("/separate_reasoning", body)
    return answer.get("reasoning_text") or "", answer.get("text") or ""


async def run_tool(
    functions: Mapping[str, Callable[..., Any]], call: ToolCall, seconds: float
) -> str:
    """What the tool says, or why it could not. A plain function runs in a thread, which goes on
    after its time: what may never end belongs in a process of its own."""
    try:
        function = functions[call.name]
        arguments = json.loads(call.arguments or "{}")
        if not isinstance(arguments, dict):
            raise TypeError("the arguments are no object")
        said = await asyncio.wait_for(hooks.call(function, **arguments), seconds)
    except asyncio.TimeoutError:
        return f"Error: {call.name} gave no answer within {seconds:g} seconds."
    except KeyError as error:
        if call.name not in functions:
            return f"Error: there is no tool {call.name}."
        return f"Error: {error!r}"
    except Exception as error:
        return f"Error: {type(error).__name__}: {error}"[:MOST_TEXT]
    text = said if isinstance(said, str) else json.dumps(said, ensure_ascii=False, default=str)
    return text[:MOST_TEXT]

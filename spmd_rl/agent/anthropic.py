"""Anthropic's messages: a body to an `Ask`, a `Reply` to a body or to events of a stream."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import orjson

from spmd_rl.agent.openai import may_call
from spmd_rl.agent.protocol import Ask, Refused, Reply, positive, text_of, texts

CHOICES = {"any": "required", "tool": "required"}
KINDS = {400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error"}


def read(body: dict[str, Any]) -> Ask:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise Refused("messages is missing or empty")
    found = [part for message in messages for part in _messages(message)]
    if body.get("system"):
        found.insert(0, {"role": "system", "content": text_of(body["system"], "system")})
    choice = str((body.get("tool_choice") or {}).get("type", "auto"))
    return Ask(
        messages=found,
        model=str(body.get("model", "")),
        tools=[_tool(tool) for tool in body.get("tools") or ()],
        use_tools=may_call(CHOICES.get(choice, choice)),
        max_tokens=positive(body.get("max_tokens"), "max_tokens"),
        stop=texts(body.get("stop_sequences")),
        stream=bool(body.get("stream")),
    )


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    if "input_schema" not in tool:
        raise Refused(f"the tool {tool.get('name')} has no input_schema: give it one")
    about = {"description": tool["description"]} if tool.get("description") else {}
    function = {"name": tool.get("name")} | about | {"parameters": tool["input_schema"]}
    return {"type": "function", "function": function}


def _messages(message: dict[str, Any]) -> list[dict[str, Any]]:
    """One message of blocks as several: results of tools come before what the user says."""
    role, content = message.get("role"), message.get("content")
    if role not in ("user", "assistant", "system"):
        raise Refused(f"a message has the role {role!r}: it must be user or assistant")
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    said, calls, results = [], [], []
    for block in content or ():
        kind = block.get("type")
        if kind == "tool_use":
            function = {"name": block.get("name"), "arguments": block.get("input") or {}}
            calls.append({"id": block.get("id"), "type": "function", "function": function})
        elif kind == "tool_result":
            text = text_of(block.get("content"), "tool_result")
            id = block.get("tool_use_id")
            results.append({"role": "tool", "content": text, "tool_call_id": id})
        elif kind not in ("thinking", "redacted_thinking"):
            said.append(block)
    own: dict[str, Any] = {"role": role, "content": text_of(said, role)}
    if calls:
        own["tool_calls"] = calls
    return [*results, *([own] if said or calls or not results else [])]


def whole(reply: Reply, ask: Ask) -> dict[str, Any]:
    return _frame(reply, ask) | {
        "content": _blocks(reply),
        "stop_reason": finish(reply),
        "stop_sequence": reply.stopped_by,
        "usage": usage(reply),
    }


def events(reply: Reply, ask: Ask) -> Iterator[bytes]:
    """A stream's events: each block in one piece."""
    begun = {"content": [], "stop_reason": None, "stop_sequence": None}
    none_yet = usage(reply) | {"output_tokens": 0}
    message = _frame(reply, ask) | begun | {"usage": none_yet}
    yield _event({"type": "message_start", "message": message})
    for index, block in enumerate(_blocks(reply)):
        empty, delta = _opened(block)
        about = {"index": index}
        yield _event({"type": "content_block_start", "content_block": empty} | about)
        yield _event({"type": "content_block_delta", "delta": delta} | about)
        yield _event({"type": "content_block_stop"} | about)
    ended = {"stop_reason": finish(reply), "stop_sequence": reply.stopped_by}
    yield _event({"type": "message_delta", "delta": ended, "usage": usage(reply)})
    yield _event({"type": "message_stop"})


def finish(reply: Reply) -> str:
    if reply.calls:
        return "tool_use"
    if reply.answer.finish == "length":
        return "max_tokens"
    return "stop_sequence" if reply.stopped_by else "end_turn"


def usage(reply: Reply) -> dict[str, Any]:
    return {"input_tokens": reply.prompt_tokens, "output_tokens": len(reply.answer.tokens)}


def error(refused: Refused) -> dict[str, Any]:
    kind = KINDS.get(refused.status, "api_error")
    return {"type": "error", "error": {"type": kind, "message": str(refused)}}


def failed_event(refused: Refused) -> bytes:
    return _event(error(refused))


PING = b'event: ping\ndata: {"type":"ping"}\n\n'


def _frame(reply: Reply, ask: Ask) -> dict[str, Any]:
    return {"id": f"msg_{reply.id}", "type": "message", "role": "assistant", "model": ask.model}


def _blocks(reply: Reply) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    if reply.thoughts:
        found.append({"type": "thinking", "thinking": reply.thoughts, "signature": ""})
    if reply.content or not reply.calls:
        found.append({"type": "text", "text": reply.content})
    for call in reply.calls:
        given = json.loads(call.arguments or "{}")
        found.append({"type": "tool_use", "id": call.id, "name": call.name, "input": given})
    return found


def _opened(block: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A block without its content, and the content as what follows."""
    if block["type"] == "tool_use":
        return block | {"input": {}}, {
            "type": "input_json_delta",
            "partial_json": json.dumps(block["input"]),
        }
    key = block["type"]  # text or thinking
    return block | {key: ""}, {"type": f"{key}_delta", key: block[key]}


def _event(value: dict[str, Any]) -> bytes:
    return b"event: " + value["type"].encode() + b"\ndata: " + orjson.dumps(value) + b"\n\n"

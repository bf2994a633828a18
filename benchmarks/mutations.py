"""Request bodies that no client should send: valid bodies, mutated at random.

Every body is bounded in what it may cost where it happens to be valid (few tokens, few choices), so
thousands can be sent. Equal seeds give equal bodies.
"""

import copy
import json
import random
from collections.abc import Callable
from typing import Any

_SAID = [{"role": "user", "content": "What is 2 + 3?"}]
_SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
_TOOL = {"type": "function", "function": {"name": "add", "parameters": _SCHEMA}}
_QUESTION = {"type": "choice", "criteria": {"yes": None, "no": None}}

VALID: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"model": "m", "messages": _SAID, "max_tokens": 3},
    "/v1/completions": {"model": "m", "prompt": "one two", "max_tokens": 3},
    "/v1/responses": {"model": "m", "input": "What is 2 + 3?", "max_output_tokens": 3},
    "/v1/messages": {"model": "m", "messages": _SAID, "max_tokens": 3},
    "/v1/messages/count_tokens": {"model": "m", "messages": _SAID},
    "/v1/chat/completions/batch": {"model": "m", "messages": [_SAID], "max_tokens": 3},
    "/generative_scoring": {"model": "m", "query": "a", "items": ["b"], "label_token_ids": [5, 6]},
    "/v1/chat/completions/render": {"model": "m", "messages": _SAID, "max_tokens": 3},
    "/v1/completions/render": {"model": "m", "prompt": "one two", "max_tokens": 3},
    "/cohere/v2/chat": {"model": "m", "messages": _SAID, "max_tokens": 3},
    "/invocations": {"model": "m", "messages": _SAID, "max_tokens": 3},
    "/v1/systemone": {"model": "m", "state": "x", "questions": {"a": _QUESTION}},
    "/tokenize": {"model": "m", "prompt": "one two"},
    "/detokenize": {"model": "m", "tokens": [3, 50, 60]},
    "/v1/depth": {"exit_threshold": 1.0},
}
"""A small valid body of every endpoint that takes one. `/v1/depth` takes it by PUT."""

_DEPTH = "exit_threshold min_loops max_loops exit_mode exit_rule".split()
_SAMPLING = """
frequency_penalty logit_bias logprobs max_tokens n presence_penalty response_format seed stop stream
stream_options temperature top_p user use_beam_search top_k min_p repetition_penalty watermarking
length_penalty stop_token_ids include_stop_str_in_output ignore_eos min_tokens skip_special_tokens
spaces_between_special_tokens truncate_prompt_tokens truncation_side allowed_token_ids
prompt_logprobs logprob_token_ids bad_words add_special_tokens structured_outputs priority
request_id session_id return_tokens_as_token_ids return_token_ids routed_experts_prompt_start
return_token_offsets mm_payload return_mm_kwargs cache_salt kv_transfer_params ec_transfer_params
vllm_xargs repetition_detection thinking_token_budget stream_interval echo depth_preset
priority_class return_depths return_exit_cdf return_loops reasoning_effort model forced_depths
""".split()
_CHAT = """
messages top_logprobs max_completion_tokens tools tool_choice include_reasoning parallel_tool_calls
add_generation_prompt continue_final_message documents chat_template chat_template_kwargs
media_io_kwargs mm_processor_kwargs return_prompt_text functions function_call modalities audio
metadata store service_tier prediction web_search_options
""".split()
_RESPONSES = """
background include input instructions max_output_tokens max_tool_calls metadata
previous_response_id prompt reasoning service_tier store text tool_choice tools top_logprobs
truncation prompt_cache_key enable_response_messages previous_input_messages chat_template_kwargs
media_io_kwargs mm_processor_kwargs parallel_tool_calls include_reasoning
""".split()

_FIELDS: dict[str, list[str]] = {
    "/v1/completions": [*_DEPTH, *_SAMPLING, "prompt", "suffix", "prompt_embeds", "best_of"],
    "/v1/responses": [*_DEPTH, *_SAMPLING, *_RESPONSES],
    "/v1/messages": [*_SAMPLING, *_CHAT, "output_config", "thinking", "stop_sequences", "system"],
    "/generative_scoring": [*_SAMPLING, "query", "items", "label_token_ids", "apply_softmax"],
    "/v1/systemone": [*_SAMPLING, "state", "questions", "instructions", "images", *_CHAT],
    "/tokenize": ["model", "prompt", "add_special_tokens", "return_token_strs", *_CHAT],
    "/detokenize": ["model", "tokens"],
    "/v1/depth": _DEPTH,
}

_ENDLESS = "an integer of five thousand digits"
"""Stands for one until it is sent: Python writes no such integer."""

_BOUNDED: dict[Any, tuple[Any, ...]] = {
    field: (0, -1, "x", [], {}, 1.5, True, False, 1e30, 2**63, 2**64, 10**400, -(2**70), 2, 3)
    for field in ("n", "max_tokens", "max_completion_tokens", "max_output_tokens", "best_of")
}
"""Fields in which an arbitrary valid value is work without end."""

_SCALARS: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 17, 2**31, -(2**31) - 1, 2**53, 2**63 - 1, 2**63, -(2**63),
    2**64 - 1, 2**64, 10**30, -(10**30), 10**400, _ENDLESS, 0.0, -0.0, 0.5, 1.0, 1.5, -0.1, 2.5,
    5e-324, 1e-300, 1e30, -1e30, 1.7e308, float("nan"), float("inf"), float("-inf"),
    "", " ", "a", "true", "0.5", "3", "NaN", "null", "\x00", "a\x00b", "\ud800", "a\udfffb", "é",
    "\u202e\u2028", "\U0001f600" * 3, "{{ 1/0 }}", "{% for x in y %}", "[" * 200, "(" * 500,
    "auto", "none", "required", "json_object", "high", "fast", "text", "m@fast", "../../etc/passwd",
)  # fmt: skip

_SCHEMAS: tuple[Any, ...] = (
    _SCHEMA, {"$ref": "#"}, {"$ref": "#/a/b"}, {"$ref": "http://localhost:1/x"}, {"$ref": 3},
    {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
    {"$defs": {"n": {"properties": {"n": {"$ref": "#/$defs/n"}}}}, "$ref": "#/$defs/n"},
    {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]},
    {"allOf": [{"$ref": "#"}]}, {"anyOf": [{"$ref": "#"}, {"$ref": "#"}]}, {"anyOf": []},
    {"not": {}}, {"enum": []}, {"enum": [1, "a", None, {"b": []}, 1e400]},
    {"const": {"a": 10**30}}, {"type": "no such type"}, {"type": ["string", 3]}, {"type": []},
    {"type": "integer", "minimum": 10**30}, {"type": "integer", "minimum": 5, "maximum": 1},
    {"type": "integer", "multipleOf": 0}, {"type": "number", "minimum": float("nan")},
    {"type": "string", "pattern": "("}, {"type": "string", "pattern": "(a+)+$"},
    {"type": "string", "pattern": "(?<=a)b"}, {"type": "string", "pattern": 5},
    {"type": "string", "format": "no such format"},
    {"type": "string", "minLength": 10, "maxLength": 2}, {"type": "string", "minLength": -1},
    {"type": "string", "maxLength": 2**40}, {"type": "array", "minItems": 10**6},
    {"type": "array", "minItems": 5, "maxItems": 1},
    {"type": "array", "items": {"type": "array", "items": {"$ref": "#"}}, "minItems": 2},
    {"type": "array", "items": 3, "prefixItems": "x"}, {"type": "array", "uniqueItems": True},
    {"type": "object", "properties": []},
    {"type": "object", "properties": {"": {}, "\ud800": {}, "\x00": {}}},
    {"type": "object", "required": ["b"], "additionalProperties": False},
    {"type": "object", "required": 3}, {"type": "object", "patternProperties": {"(": {}}},
    {"type": "object", "minProperties": 10**9},
    {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(300)}},
    {"if": {}, "then": {"$ref": "#"}, "else": False}, {}, True, False, [], "{",
    '{"type": "object"}',
)  # fmt: skip

_REGEXES = (
    "(", "[", "*", "a{2,1}", "a{1000000}", "(a{1000}){1000}", "(a+)+b", "(a|a)*b", "(?P<x>a)(?P=x)",
    r"\1", "(?=a)", "(?<!a)b", r"\p{L}+", r"\u12", "[z-a]", "\x00", "\ud800", "", "^$", ".*",
    r"[^\s\S]",
    "(" * 300 + ")" * 300, "a?" * 60 + "a" * 60, "|" * 1000, "[0-9]{3}",
)  # fmt: skip

_GRAMMARS = (
    "root ::= root", "root ::= a", 'root ::= "a', "root ::=", "::=", 'root ::= "a" root | "b"',
    'root ::= ("a" | "b"){100000}', "start: start", 'start: "a"', "?start: /(/", "", " ",
    "\x00", "\ud800",
    'root ::= ""', "root ::= root root | root", 'root ::= [^]', 'a ::= "b"', "root ::= [a-",
    "root ::= " + "(" * 400 + '"a"' + ")" * 400,
)  # fmt: skip


def _deep(rng: random.Random) -> Any:
    """Lists or objects inside each other, from a few levels to more than a parser takes."""
    value: Any = rng.choice([1, {}, [], "x"])
    for _ in range(rng.choice([5, 30, 70, 90, 300, 600])):
        value = [value] if rng.random() < 0.5 else {"a": value}
    return value


def _wide(rng: random.Random) -> Any:
    """A collection of many elements."""
    size = rng.choice([130, 1000, 5000])
    return rng.choice(
        [
            list(range(size)),
            [rng.choice(_SCALARS) for _ in range(size)],
            {str(i): i for i in range(size)},
            ["a"] * size,
            [[i] for i in range(size)],
        ]
    )


def _long(rng: random.Random) -> str:
    return rng.choice(["a", "\u00e9", " ", "\n", "\\", "{", "9"]) * rng.choice(
        [500, 20_000, 200_000]
    )


def _structured(rng: random.Random) -> Any:
    """What stands in `structured_outputs`."""
    constraint = rng.choice(
        [
            {"json": rng.choice(_SCHEMAS)},
            {"json": json.dumps(rng.choice(_SCHEMAS))},
            {"json": _deep(rng)},
            {"regex": rng.choice(_REGEXES)},
            {"grammar": rng.choice(_GRAMMARS)},
            {"choice": rng.choice([[], ["a"], ["", ""], ["a", 3], "a", ["a" * 5000], ["\ud800"]])},
            {"json_object": rng.choice([True, False, "yes", 1, None])},
            {"structural_tag": rng.choice(["", "{", "{}", json.dumps(rng.choice(_SCHEMAS))])},
            {},
            rng.choice(_SCALARS),
            [1, 2],
        ]
    )
    if isinstance(constraint, dict) and rng.random() < 0.3:
        extra = rng.choice(["json", "regex", "whitespace_pattern", "_backend", "no_such_key"])
        constraint[extra] = any_value(rng)
    return constraint


def _response_format(rng: random.Random) -> Any:
    schema = rng.choice(_SCHEMAS)
    return rng.choice(
        [
            {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}},
            {"type": "json_schema", "json_schema": schema},
            {"type": "json_schema"},
            {"type": "json_object"},
            {"type": "structural_tag", "structures": [], "triggers": []},
            {"type": "structural_tag", "format": schema},
            {"type": rng.choice(_SCALARS)},
        ]
    )


def _text(rng: random.Random) -> Any:
    schema = rng.choice(_SCHEMAS)
    return rng.choice([{"format": {"type": "json_schema", "name": "s", "schema": schema}}, schema])


def _tools(rng: random.Random) -> Any:
    tool: Any = copy.deepcopy(_TOOL)
    tool["function"][rng.choice(["name", "parameters", "strict", "description"])] = any_value(rng)
    return rng.choice([[tool], [{**_TOOL, "type": rng.choice(_SCALARS)}], [tool, tool], tool])


def _tool_choice(rng: random.Random) -> Any:
    name = rng.choice(["add", "no_such_tool", "", 3, None])
    return rng.choice(
        ["auto", "none", "required", {"type": "function", "function": {"name": name}}, {}, name]
    )


def _messages(rng: random.Random) -> Any:
    role = rng.choice(["user", "assistant", "system", "tool", "developer", "", "nobody", 3, None])
    content = rng.choice(
        [
            "hi",
            any_value(rng),
            [{"type": "text", "text": any_value(rng)}],
            [{"type": rng.choice(["image_url", "input_audio", "video_url", "refusal", "x", 3])}],
            [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}],
            [3],
        ]
    )
    turn = {"role": role, "content": content}
    if rng.random() < 0.3:
        turn[rng.choice(["tool_calls", "name", "reasoning", "tool_call_id"])] = any_value(rng)
    if rng.random() < 0.2:
        call = {
            "id": "1",
            "type": "function",
            "function": {"name": "f", "arguments": any_value(rng)},
        }
        turn = {"role": "assistant", "tool_calls": [call]}
    return rng.choice([[turn], [turn, *_SAID], [*_SAID, turn], [], [turn] * 50])


def _prompt(rng: random.Random) -> Any:
    return rng.choice(
        ["", [], [""], [[]], [1, "a"], [[1], "a"], [-1], [2**40], [5.5], [[1, 2], [3]], ["a", "b"]]
    )


def _bias(rng: random.Random) -> Any:
    key = rng.choice(["5", "-1", "999999", "1e3", "", "x", str(10**30), str(2**63), "5.0"])
    return {key: rng.choice(_SCALARS)}


def _xargs(rng: random.Random) -> Any:
    field = rng.choice(
        [*_DEPTH, "forced_depths", "depth_preset", "exit_treshold", "kv_transfer_params"]
    )
    return {field: any_value(rng)}


_SHAPED: dict[str, Callable[[random.Random], Any]] = {
    "structured_outputs": _structured,
    "response_format": _response_format,
    "text": _text,
    "tools": _tools,
    "tool_choice": _tool_choice,
    "messages": _messages,
    "input": _messages,
    "prompt": _prompt,
    "logit_bias": _bias,
    "vllm_xargs": _xargs,
}
"""Fields whose values go deep: half of the time one is made in the field's own shape."""


def any_value(rng: random.Random) -> Any:
    """A value of any kind."""
    draw = rng.random()
    if draw < 0.6:
        return rng.choice(_SCALARS)
    if draw < 0.7:
        return _deep(rng)
    if draw < 0.75:
        return _wide(rng)
    if draw < 0.8:
        return _long(rng)
    if draw < 0.9:
        return [rng.choice(_SCALARS) for _ in range(rng.randrange(4))]
    names = [*_SAMPLING, *_CHAT, "type", "a", ""]
    return {rng.choice(names): rng.choice(_SCALARS) for _ in range(rng.randrange(4))}


def _set_field(rng: random.Random, path: str, body: dict[str, Any]) -> None:
    fields = _FIELDS.get(path, [*_DEPTH, *_SAMPLING, *_CHAT])
    if rng.random() < 0.3:
        fields = [field for field in fields if field in _SHAPED] or fields
    field = rng.choice(fields)
    if field in _BOUNDED:
        body[field] = rng.choice(_BOUNDED[field])
    elif field in _SHAPED and rng.random() < 0.6:
        body[field] = _SHAPED[field](rng)
    else:
        body[field] = any_value(rng)


def _set_inside(rng: random.Random, body: dict[str, Any]) -> None:
    """Replace something somewhere inside the body."""
    places: list[tuple[Any, Any]] = []

    def walk(node: Any, depth: int) -> None:
        if depth > 6:
            return
        for key in list(node) if isinstance(node, dict) else range(min(len(node), 20)):
            if key not in _BOUNDED:
                places.append((node, key))
            if isinstance(node[key], (dict, list)):
                walk(node[key], depth + 1)

    walk(body, 0)
    if places:
        node, key = rng.choice(places)
        node[key] = any_value(rng)


def _corrupted(rng: random.Random, text: bytes) -> bytes:
    """Bytes that are no longer the JSON they were."""
    spot = rng.randrange(len(text) + 1)
    return rng.choice(
        [
            text[:spot],
            text[:spot] + b"\xff\xfe" + text[spot:],
            text[:spot] + b"\x00" + text[spot:],
            b"[" * 5000,
            b'{"a":' * 5000 + b"1" + b"}" * 5000,
            b"",
            b"null",
            b"[]",
            b'"text"',
            b"3",
            b"[" + text + b"]",
            text[:-1] + b',"model":3}',
            text[:-1] + b',"n":' + b"9" * 5000 + b"}",
            text[:-1] + b',"temperature":1e999}',
            text[:-1] + b',"temperature":-Infinity}',
            b"\xef\xbb\xbf" + text,
            text.decode().encode("utf-16"),
        ]
    )


def mutated(rng: random.Random, path: str) -> dict[str, Any] | bytes:
    """A mutated body for an endpoint of `VALID`.

    Args:
        rng: where the choices come from.
        path: the endpoint.

    Returns:
        An object, which may hold NaN, infinities, lone surrogates and numbers of any size; send it
        as `encoded` makes it. Or, for one in ten, bytes.
    """
    body = copy.deepcopy(VALID[path])
    if path not in ("/tokenize", "/detokenize", "/v1/depth", "/generative_scoring"):
        if rng.random() < 0.25:
            body["stream"] = True
        if rng.random() < 0.1:
            body["tools"] = [_TOOL]
    for _ in range(rng.choice([1, 1, 1, 2, 2, 3])):
        draw = rng.random()
        if draw < 0.8:
            _set_field(rng, path, body)
        elif draw < 0.93:
            body = json.loads(json.dumps(body))  # a copy: the parts are shared between bodies
            _set_inside(rng, body)
        else:
            keys = [key for key in body if key not in _BOUNDED]
            if keys:
                del body[rng.choice(keys)]
    if rng.random() < 0.1:
        return _corrupted(rng, encoded(body))
    return body


def encoded(body: dict[str, Any] | bytes) -> bytes:
    """A body as it is sent: JSON in which NaN, infinities and lone surrogates survive."""
    if isinstance(body, bytes):
        return body
    return json.dumps(body).replace(json.dumps(_ENDLESS), "9" * 5000).encode()

"""Ten thousand bad lines: each ends in exactly one request or one error, in a form that can be written, and nothing else happens."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from flexgen import LLM, RequestError, SamplingParams
from flexgen.api.job_request import JobRequest
from flexgen.jobs.forms import Forms
from flexgen.jobs.lines import read_lines
from flexgen.jobs.reading import encode_prompts
from flexgen.outputs import ClassificationOutput, ClassificationRequestOutput, CompletionOutput, RequestOutput

NUM_LINES = 10_000
BATCH = 500
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
COMPLETION = CompletionOutput(index=0, text="a", token_ids=(1,), finish_reason="stop")

NAMES = [
    "prompt", "messages", "id", "custom_id", "method", "url", "body", "model", "n", "best_of", "echo", "logprobs", "top_logprobs", "stop",
    "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "logit_bias", "stop_token_ids", "bad_words",
    "presence_penalty", "repetition_penalty", "min_tokens", "allowed_token_ids", "response_format", "tools", "tool_choice", "stream",
    "user", "metadata", "chat_template", "chat_template_kwargs", "add_generation_prompt", "continue_final_message", "reasoning_effort",
    "role", "content", "type", "text", "tool_calls", "function", "arguments", "name", "unknown", "choices", "prompt_logprobs",
]  # fmt: skip
# JSON, nearly JSON, and what parsers have died of.
SCRAPS = [
    "null", "true", "false", "0", "-0", "1", "-1", "1.5", "1e5", "1e999", "-1e999", "NaN", "Infinity", "-Infinity", "9" * 30, "9" * 5000,
    "-" + "9" * 400, "0." + "9" * 400, '""', '"a"', '"\\ud800"', '"\\udfff\\ud800"', '"\\ud83d\\ude00"', '"\\u0000"', '"\ud83d"',
    '"\ufeff"',
    '"user"', '"assistant"', '"text"', '"image_url"', '"POST"', '"/v1/completions"', '"/v1/chat/completions"', '"' + "x" * 3000 + '"',
    "[]", "{}", "[[]]", "[{}]", "[null]", "[1, 2, 3]", '["a"]', "[1, [2], {}]", "[" * 50 + "]" * 50, "[" * 5000, '{"a": ' * 5000,
    "[" * 2000 + "]" * 2000, '{"a": 1, "a": 2}', "undefined", "'a'", "01", "+1", ".5", "1.", "0x1", '"\\x"', '"unfinished', "\x00", "//",
    ",",
]  # fmt: skip


def scrap(chance: random.Random, depth: int) -> str:
    """A value of some kind, or what is none."""
    kind = chance.randrange(8)
    if depth and kind < 2:
        return "{" + ", ".join(f"{name(chance)}: {scrap(chance, depth - 1)}" for _ in range(chance.randrange(4))) + "}"
    if depth and kind < 4:
        return "[" + ", ".join(scrap(chance, depth - 1) for _ in range(chance.randrange(4))) + "]"
    return chance.choice(SCRAPS) if kind < 7 else json.dumps(chance.choice(NAMES))


def name(chance: random.Random) -> str:
    return json.dumps(chance.choice(NAMES)) if chance.random() < 0.98 else chance.choice(SCRAPS)


def fields(chance: random.Random, start: str) -> str:
    """An object that begins well."""
    more = "".join(f", {name(chance)}: {scrap(chance, 3)}" for _ in range(chance.randrange(3)))
    return start.removesuffix("}") + more + "}"


def nearly_right(chance: random.Random) -> str:
    prompt = f'"prompt": {chance.choice([json.dumps("p"), "[1]", scrap(chance, 3)])}'
    message = "{" + f'"role": "user", "content": {chance.choice([json.dumps("c"), scrap(chance, 3)])}' + "}"
    messages = f'"messages": [{fields(chance, message)}]'
    content = chance.choice([prompt, messages, f'"messages": {scrap(chance, 3)}'])
    if chance.random() < 0.2:
        content += f', "choices": [{chance.choice([json.dumps("c"), "[1]"])}, {scrap(chance, 2)}]'
    if chance.random() < 0.5:
        return fields(chance, "{" + content + "}")
    url = chance.choice(["/v1/completions", "/v1/chat/completions"])
    body = fields(chance, "{" + content + "}")
    return fields(chance, "{" + f'"custom_id": "c", "method": "POST", "url": "{url}", "body": {body}' + "}")


def damaged(chance: random.Random) -> bytes:
    line = bytearray(nearly_right(chance).encode(errors="surrogatepass"))
    for _ in range(chance.randrange(1, 4)):
        place = chance.randrange(len(line) + 1)
        line[place : place + chance.randrange(3)] = chance.randbytes(chance.randrange(3))
    return bytes(line[: chance.randrange(len(line) + 1)] if chance.random() < 0.2 else line)


KINDS: list[Callable[[random.Random], bytes]] = [
    lambda chance: nearly_right(chance).encode(errors="surrogatepass"),
    lambda chance: nearly_right(chance).encode(errors="surrogatepass"),
    damaged,
    lambda chance: scrap(chance, 5).encode(errors="surrogatepass"),
    lambda chance: chance.randbytes(chance.randrange(1, 60)),
    lambda chance: chance.choice(
        [b"\xef\xbb\xbf{}", b"\xff\xfe{\0}\0", b"\xc0\x80", b'{"prompt": "\xed\xa0\x80"}', b"\0" * 99, b"[" * 10**5]
    ),
]


def bad_lines() -> bytes:
    chance = random.Random(20261121)
    lines = (chance.choice(KINDS)(chance).replace(b"\n", b" ").strip() or b"." for _ in range(NUM_LINES))
    return b"\n".join(lines)


@pytest.fixture(scope="module")
def llm(model_folder: Path) -> Iterator[LLM]:
    with LLM(model_folder, chat_template=TEMPLATE) as llm:
        yield llm


def answer(request: JobRequest, prompt: Sequence[int], choices: Sequence[Sequence[int]]) -> dict[str, Any]:
    """The record of a line that can be served."""
    assert all(type(each) is int for ids in (prompt, *choices) for each in ids)
    ids, numbers = tuple(prompt), [-1.0] * len(choices)
    if choices:
        scores = ClassificationOutput(probs=numbers, logprobs=numbers, num_tokens=[1] * len(choices), is_greedy=[True] * len(choices))
        return request.form.scored(request, ClassificationRequestOutput(request_id="0", prompt=None, prompt_token_ids=ids, outputs=scores))
    output = RequestOutput(request_id="0", prompt="p", prompt_token_ids=ids, outputs=[COMPLETION] * request.params.n)
    return request.form.success(request, [output])


def test_every_bad_line_has_one_outcome(llm: LLM) -> None:
    forms = Forms(model="m", created=1, defaults=SamplingParams())
    parsed = [forms.parse(line) for line in read_lines(io.BytesIO(bad_lines()))]
    assert [request.line_number for request in parsed] == list(range(1, NUM_LINES + 1))
    outcomes = {"request": 0, "error": 0}
    for start in range(0, NUM_LINES, BATCH):
        batch = [each for request in parsed[start : start + BATCH] for each in request.of_each_prompt()]
        prompts = encode_prompts(llm.model, batch)
        for request, found in zip(batch, prompts, strict=True):
            if isinstance(found, RequestError):
                record = request.form.failure(request, found)
            else:
                record = answer(request, *found)
            json.dumps(record, allow_nan=False).encode("ascii")
            outcomes["error" if isinstance(found, RequestError) else "request"] += 1
    assert min(outcomes.values()) > NUM_LINES // 50, "the generator is of no use if lines are all good or all bad"


def test_every_bad_line_is_text(llm: LLM) -> None:
    forms = Forms(model="m", created=1, defaults=SamplingParams(), input_format="text")
    parsed = [forms.parse(line) for line in read_lines(io.BytesIO(bad_lines()))]
    assert len(parsed) == NUM_LINES
    assert all(each.error is None or each.error.code == "invalid_utf8" for each in parsed)

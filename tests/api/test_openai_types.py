"""What claims to be OpenAI's is: its client's types parse every line, and a file that was made for it runs as it is."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fakes import FakeEngine
from openai.types import Completion, ErrorObject
from openai.types.chat import ChatCompletion

from flexgen import LLM, RequestError, SamplingParams
from flexgen.api.job_request import JobRequest
from flexgen.api.openai import OpenAIForm
from flexgen.jobs.forms import Forms
from flexgen.jobs.lines import Line
from flexgen.jobs.reading import encode_prompts
from flexgen.outputs import CompletionOutput, Logprob, RequestOutput
from flexgen.plan.workload import Workload

TEMPLATE = "{% for m in messages %}{{ m.content[:9] }}{% endfor %}"
BODIES = {"/v1/completions": Completion, "/v1/chat/completions": ChatCompletion}
# Lines as the guides of the hosted API have them, with the fields that its clients write.
HOSTED: list[dict[str, Any]] = [
    {
        "custom_id": "request-1", "method": "POST", "url": "/v1/chat/completions",
        "body": {
            "model": "gpt-4o-mini", "max_tokens": 10,
            "messages": [{"role": "system", "content": "You are a helpful assistant."}, {"role": "user", "content": "Hello world!"}],
        },
    },
    {
        "custom_id": "request-2", "method": "POST", "url": "/v1/chat/completions",
        "body": {
            "model": "gpt-4o-mini", "max_completion_tokens": 5, "temperature": 0.2, "top_p": 0.9, "n": 2, "stop": ["\n\n", "END"],
            "seed": 7, "presence_penalty": 0.1, "frequency_penalty": 0.1, "logit_bias": {"64": -100}, "logprobs": True, "top_logprobs": 2,
            "response_format": {"type": "text"}, "stream": False, "store": False, "metadata": {"project": "x"}, "user": "someone",
            "service_tier": "auto", "parallel_tool_calls": True,
            "messages": [
                {"role": "developer", "content": [{"type": "text", "text": "Be brief."}]},
                {"role": "user", "name": "Ada", "content": [{"type": "text", "text": "One"}, {"type": "text", "text": "two"}]},
                {"role": "assistant", "content": "Three.", "refusal": None},
                {"role": "user", "content": "And?"},
            ],
        },
    },
    {
        "custom_id": "request-3", "method": "POST", "url": "/v1/completions",
        "body": {"model": "gpt-3.5-turbo-instruct", "prompt": "say this is a test", "max_tokens": 7, "temperature": 0, "logprobs": 3},
    },
    {"custom_id": "request-4", "method": "POST", "url": "/v1/completions", "body": {"model": "m", "prompt": ["once"], "echo": False}},
]  # fmt: skip


def check(record: dict[str, Any]) -> None:
    """Raises when a record is none of OpenAI's.  (The client has no type for the line around the body.)"""
    assert set(record) == {"id", "custom_id", "response", "error"}
    assert record["error"] is None
    assert set(record["response"]) == {"status_code", "request_id", "body"}
    body = json.dumps(record["response"]["body"], allow_nan=False)
    if record["response"]["status_code"] == 200:
        kinds = {"text_completion": Completion, "chat.completion": ChatCompletion}
        kinds[record["response"]["body"]["object"]].model_validate_json(body, strict=True)
    else:
        ErrorObject.model_validate_json(json.dumps(json.loads(body)["error"]), strict=True)


def completion(index: int, num_logprobs: int | None) -> CompletionOutput:
    logprobs = None
    if num_logprobs is not None:
        entries = {place: Logprob(logprob=-0.5 * place, rank=place, decoded_token=f"t{place}") for place in range(1, num_logprobs + 1)}
        logprobs = [{9: Logprob(logprob=float("-inf"), rank=900, decoded_token=None), **entries}] * 2
    return CompletionOutput(index=index, text="☃", token_ids=(9, 9), finish_reason="stop" if index else "length", logprobs=logprobs)


@pytest.mark.parametrize("url", list(BODIES))
def test_answers(url: str) -> None:
    form = OpenAIForm(url=url, model="m", created=1, defaults=SamplingParams())
    for n, num_logprobs, shows_ids in itertools.product((1, 3), (None, 0, 2), (False, True)):
        params = SamplingParams(n=n, logprobs=num_logprobs)
        request = JobRequest(line_number=1, digest=2, id="c", form=form, prompt="p", params=params, return_token_ids=shows_ids)
        outputs = [completion(index, num_logprobs) for index in range(n)]
        record = form.success(request, [RequestOutput(request_id="0", prompt="p", prompt_token_ids=(1,) * 5, outputs=outputs)])
        check(record)
        assert record["response"]["status_code"] == 200


@pytest.mark.parametrize("error", [RequestError("no"), RequestError("no", code="unsupported_url", param="url")])
@pytest.mark.parametrize("identity", ["c", None])
def test_errors(error: RequestError, identity: str | None) -> None:
    form = OpenAIForm(url=None, model="m", created=1, defaults=SamplingParams())
    check(form.failure(JobRequest(line_number=1, digest=2, id=identity, form=form, error=error), error))


@pytest.fixture
def llm(model_folder: Path, engines: list[FakeEngine]) -> Iterator[LLM]:
    with LLM(model_folder, chat_template=TEMPLATE) as llm:
        yield llm


def test_a_file_made_for_the_hosted_api_runs_as_it_is(llm: LLM) -> None:
    forms = Forms(model="m", created=1, defaults=llm.get_default_sampling_params())
    parsed = [forms.parse(Line(number=n, content=json.dumps(line).encode(), digest=n)) for n, line in enumerate(HOSTED, 1)]
    prompts = encode_prompts(llm.model, parsed)
    for request, found, line in zip(parsed, prompts, HOSTED, strict=True):
        assert not isinstance(found, RequestError)
        ids, _ = found
        token_requests = llm.model.token_requests(request.line_number << 16, ids, request.params)
        lengths = Workload(prompt_lens=(len(ids),) * len(token_requests), output_lens=tuple(each.max_tokens for each in token_requests))
        record = request.form.success(request, [llm.model.output(llm.stream(token_requests, lengths), request.params, ids)])
        check(record)
        assert record["custom_id"] == line["custom_id"]
        assert len(record["response"]["body"]["choices"]) == line["body"].get("n", 1)
        for name in ("temperature", "top_p", "seed", "presence_penalty", "max_tokens"):
            assert line["body"].get(name) in (None, getattr(request.params, name))

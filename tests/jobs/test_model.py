"""A job needs no more of a model than its protocol says: one that is no `LLM` answers a file, too."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fakes import FakeEngine, fake_scores
from jobs.places import paths_of

from flexgen import RequestError, SamplingParams
from flexgen.chat import Chat, ToolUse
from flexgen.jobs.export import export
from flexgen.jobs.folder import JobFolder
from flexgen.jobs.identity import identity_of
from flexgen.jobs.model import JobModel
from flexgen.jobs.runner import Job
from flexgen.jobs.store import Store
from flexgen.outputs import CompletionOutput, RequestOutput
from flexgen.plan.tell.forecast import Plan
from flexgen.plan.workload import Workload
from flexgen.report.progress import Progress
from flexgen.request import PartialAnswer, TokenRequest, TokenResult
from flexgen.text.choices import choice_requests
from flexgen.text.common_prefixes import NO_PREFIXES, CommonPrefixes, PrefixCensus


class Echo:
    """A model that repeats the prompt; tokens are characters."""

    name, max_model_len, tokenizer = "echo", 100, "characters"

    def fingerprint(self) -> dict[str, Any]:
        return {"model": "echo"}

    def resume(self, begun: Mapping[str, Any]) -> str:
        return ""

    def render_chats(self, chats: Sequence[Chat], *, now: float | None = None) -> Iterator[str | RequestError]:
        return iter(["".join(message["content"] for message in chat.messages) for chat in chats])

    def encode_each(self, texts: Iterable[str | RequestError], *, add_special_tokens: bool = True) -> Iterator[list[int] | RequestError]:
        return (each if isinstance(each, RequestError) else [*map(ord, each)] for each in texts)

    def token_requests(self, index: int, prompt_token_ids: Sequence[int], params: SamplingParams) -> list[TokenRequest]:
        ids = tuple(prompt_token_ids)
        return [TokenRequest(index=index + choice, prompt_token_ids=ids, max_tokens=len(ids)) for choice in range(params.n)]

    def choice_requests(self, index: int, prompt_token_ids: Sequence[int], choices: Sequence[Sequence[int]]) -> list[TokenRequest]:
        return choice_requests(index, prompt_token_ids, choices)

    def tool_params(self, params: SamplingParams, tools: ToolUse) -> SamplingParams:
        raise RequestError("there are no tools", code="unsupported_field", param="tools")

    def prefix_census(self) -> PrefixCensus | None:
        return None

    def open(self, workload: Workload) -> Plan:
        return FakeEngine(workload).plan

    def shrink(self) -> int | None:
        return None

    def stream(
        self,
        requests: Iterable[TokenRequest],
        workload: Workload,
        *,
        prefixes: CommonPrefixes = NO_PREFIXES,
        on_progress: Callable[[Progress], None] | None = None,
        on_pass: Callable[[Iterable[PartialAnswer]], None] | None = None,
    ) -> Iterator[TokenResult]:
        for request in requests:
            answer = request.prompt_token_ids if request.max_tokens else ()
            yield TokenResult(index=request.index, token_ids=answer, prompt_logprobs=fake_scores(request))

    def output(
        self,
        results: Iterable[TokenResult],
        params: SamplingParams,
        prompt_token_ids: Sequence[int],
        prompt: str | None = None,
        tools: ToolUse | None = None,
    ) -> RequestOutput:
        completions = [
            CompletionOutput(index=choice, text=self.text_of(each.token_ids), token_ids=each.token_ids, finish_reason="length")
            for choice, each in enumerate(results)
        ]
        return RequestOutput(request_id="0", prompt=prompt, prompt_token_ids=tuple(prompt_token_ids), outputs=completions)

    def text_of(self, token_ids: Sequence[int]) -> str:
        return "".join(map(chr, token_ids))


def test_a_job_of_another_model(tmp_path: Path) -> None:
    model: JobModel = Echo()
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines: list[dict[str, Any]] = [{"prompt": "abc"}, {"prompt": 7}, {"messages": [{"role": "user", "content": "de"}], "n": 2}]
    lines += [{"prompt": [97, 98], "echo": True}, {"prompt": "ab", "choices": ["c", "de"]}]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with JobFolder(paths_of(output)) as folder, Store(folder) as store:
        defaults = SamplingParams(max_tokens=None)
        store.begin(identity_of(model, defaults), model.name)
        job = Job(model, source, store, defaults=defaults)
        workload = job.scan()
        job.open(workload)
        job.run(workload)
        export(store.paths, output)
    first, second, third, fourth, fifth = map(json.loads, output.read_text().splitlines())
    assert first["text"] == "abc"
    assert second["error"]["param"] == "prompt"
    assert third["text"] == ["de", "de"]
    assert fourth["text"] == "abab"
    assert [(label["text"], label["num_tokens"]) for label in fifth["labels"]] == [("c", 1), ("de", 2)]

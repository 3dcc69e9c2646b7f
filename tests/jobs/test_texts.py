"""Texts of answers and names of tokens in all forms of lines, by the command: a trained model with a tokenizer of Llama 2's kind."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizer_kinds import ids_of, make_tokenizer
from typer.testing import CliRunner

from flexgen import LLM, SamplingParams, cli
from flexgen.plan.workload import Workload
from flexgen.request import Generated
from flexgen.text.tokenizer import UNFINISHED, Tokenizer

WAVE = ("<0xF0>", "<0x9F>", "<0x8C>", "<0x8A>")
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}<|assistant|>"


@pytest.fixture(scope="module")
def llama() -> Tokenizer:
    return make_tokenizer("llama2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, novels_qwen3: Path, llama: Tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("models") / "llama"
    shutil.copytree(novels_qwen3, folder, ignore=shutil.ignore_patterns("tokenizer*", "*.md"))
    llama.hf.save_pretrained(folder)
    return folder


def answered(folder: Path, place: Path, lines: list[dict[str, Any]], *options: str) -> list[dict[str, Any]]:
    """Records of bare lines, and the choices of OpenAI's."""
    source, output = place / "in.jsonl", place / "out.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    args = ["run", folder, source, "-o", output, "--dtype", "float32", "--chat-template", TEMPLATE, *options]
    done = CliRunner().invoke(cli.app, [str(arg) for arg in args])
    assert done.exit_code == 0, done.output
    records = [json.loads(line) for line in output.read_text().splitlines()]
    return [record["response"]["body"]["choices"][0] if "response" in record else record for record in records]


def batch(kind: str, **body: Any) -> dict[str, Any]:
    return {"custom_id": "a", "method": "POST", "url": f"/v1/{kind}", "body": {"model": "m", "temperature": 0, **body}}


def test_texts_in_all_forms(folder: Path, tmp_path: Path, llama: Tokenizer) -> None:
    stood, text = ids_of(llama, "▁stood"), "a:\n"
    how: dict[str, Any] = {"max_tokens": 2, "temperature": 0, "allowed_token_ids": stood}
    messages = [{"role": "user", "content": text}]
    prompts: list[dict[str, Any]] = [{"prompt": text}, {"prompt": ids_of(llama, "a", ":")}, {"messages": messages}]
    lines = [{**prompt, **how} for prompt in prompts] + [{**prompt, **how, "stop": [" stood"]} for prompt in prompts]
    lines += [{"prompt": ids_of(llama, "<s>"), **how}, {**prompts[0], **how, "n": 2}]
    lines += [batch("completions", prompt=text, **how), batch("chat/completions", messages=messages, **how)]
    records = answered(folder, tmp_path, lines)
    assert [record["text"] for record in records[:3]] == [" stood stood"] * 3
    assert [(record["text"], record["stop_reason"]) for record in records[3:6]] == [("", " stood")] * 3
    assert [record["text"] for record in records[6:8]] == ["stood stood", [" stood stood"] * 2]
    assert records[8]["text"] == records[9]["message"]["content"] == " stood stood"


def test_log_probabilities_of_labels_and_of_parts_of_a_character(folder: Path, tmp_path: Path, llama: Tokenizer) -> None:
    """Two of the likely tokens have the text of another, and four are parts of characters."""
    labels = ids_of(llama, "▁stood", "stood", "\n", "<0x0A>")
    parts = ids_of(llama, *WAVE)
    bias = {str(token_id): 100 for token_id in (*labels, *parts)}
    how: dict[str, Any] = {"max_tokens": 3, "logprobs": 20, "logit_bias": bias, "temperature": 0}
    everything = batch("completions", prompt="a", max_tokens=1, logprobs=-1, allowed_token_ids=labels[:1])
    lines = [batch("completions", prompt="a", **how), everything, {"prompt": "a", **how}]
    lines += [batch("chat/completions", messages=[{"role": "user", "content": "a"}], **(how | {"logprobs": True, "top_logprobs": 20}))]
    lines += [{"prompt": "a", "max_tokens": 1, "logprobs": 0, "temperature": 0, "allowed_token_ids": [part]} for part in parts]
    short, whole, plain, chat, *single = answered(folder, tmp_path, lines, "--max-logprobs", "-1")
    assert all(len(step) in (20, 21) for step in short["logprobs"]["top_logprobs"])
    for name, value, step in zip(*(short["logprobs"][name] for name in ("tokens", "token_logprobs", "top_logprobs")), strict=True):
        assert step[name] == value
    (step,) = whole["logprobs"]["top_logprobs"]
    vocab = json.loads((folder / "config.json").read_text())["vocab_size"]
    assert len(step) == vocab, "no probability is lost"
    assert {" stood", "stood", "\n"} <= set(step)
    assert [len(each["top_logprobs"]) for each in (*plain["logprobs"], *chat["logprobs"]["content"])] == [20] * 6
    assert [record["logprobs"][0]["bytes"] for record in single] == [[byte] for byte in "\N{WATER WAVE}".encode()]
    assert [record["text"] for record in single] == [UNFINISHED] * 4


def test_an_answer_that_goes_on_is_the_same(folder: Path, llama: Tokenizer) -> None:
    """Wherever it was interrupted: before its first token, within a stop string, behind none."""
    prompt, (stood, a) = ids_of(llama, "a", ":"), ids_of(llama, "▁stood", "▁a")
    params = SamplingParams(temperature=0, max_tokens=3, allowed_token_ids=[stood], stop=[" stood stood", "x"], min_tokens=1)
    with LLM(folder, dtype="float32") as llm:
        for earlier in ((), (stood,), (a, stood)):
            (request,) = llm.model.token_requests(0, prompt, params)
            request = dataclasses.replace(request, generated=Generated(token_ids=earlier))
            results = list(llm.stream([request], Workload(prompt_lens=(len(prompt),), output_lens=(3,))))
            (answer,) = llm.model.output(results, params, prompt).outputs
            assert answer.stop_reason == " stood stood"
            assert answer.text == (" a" if a in earlier else "")

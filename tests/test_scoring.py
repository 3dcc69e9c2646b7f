"""Scores of the bundled model are those of transformers in float64, wherever weights and KV live and however prompts are cut."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from flexgen import LLM, RequestOutput, SamplingParams
from flexgen.jobs.durable import answer_lines

CONTEXT = 512
TOLERANCE = 2e-4  # what float32 does to log probabilities of this model, several times over
SCORE = SamplingParams(max_tokens=0, prompt_logprobs=3)
TEXTS = [
    "It was a dark and stormy night; the rain fell in torrents",
    "It was a dark and stormy night; the rain fell in torrents, except at occasional intervals",
    "\N{WATER WAVE} Über die Brücke \N{SNOWMAN}\n\nCHAPTER II.",
    "She",
]
PLACES: dict[str, dict[str, Any]] = {
    "memory": {},
    "streamed": {"weights": "disk=1", "kv": "host=1", "micro_batch_tokens": 16, "prefill_tokens": 24},
    "zigzag": {"weights": "host=.5,disk=.5", "kv": "disk=1", "schedule": "zigzag", "micro_batch_tokens": 32, "max_num_seqs": 3},
    "row": {"kv": "host=1", "schedule": "row", "micro_batch_tokens": 48, "max_num_seqs": 2, "prefix_sharing": False},
}


@dataclass
class Reference:
    """transformers, in float64."""

    model: Any
    tokenizer: Any

    @torch.no_grad()
    def logprobs(self, ids: Sequence[int]) -> torch.Tensor:
        """After each token those of all tokens, (tokens, vocab)."""
        return torch.log_softmax(self.model(torch.tensor([list(ids)])).logits[0], dim=-1)

    def score(self, context: Sequence[int], choice: Sequence[int]) -> tuple[float, bool]:
        """The log probability of some tokens after others, and whether each is the likeliest; the last is only predicted."""
        rows = self.logprobs([*context, *choice][:-1])[len(context) - 1 :]
        wanted = torch.tensor(list(choice))
        return rows.gather(1, wanted[:, None]).sum().item(), torch.equal(rows.argmax(dim=-1), wanted)

    def encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """lm-evaluation-harness's TemplateLM._encode_pair."""
        n_spaces = len(context) - len(context.rstrip())
        if n_spaces > 0:
            continuation = context[-n_spaces:] + continuation
            context = context[:-n_spaces]
        whole = self.tokenizer(context + continuation)["input_ids"]
        before = self.tokenizer(context)["input_ids"]
        return before, whole[len(before) :]


@pytest.fixture(scope="module")
def reference(novels_opt: Path) -> Reference:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(novels_opt, dtype=torch.float64, attn_implementation="eager").eval()
    return Reference(model, AutoTokenizer.from_pretrained(novels_opt))


@pytest.fixture(scope="module")
def llm(novels_opt: Path) -> Iterator[LLM]:
    with LLM(novels_opt, dtype="float32", max_logprobs=-1) as llm:
        yield llm


@pytest.fixture(scope="module")
def full(reference: Reference) -> list[int]:
    """A prompt that fills the context, and two tokens more."""
    return [*reference.tokenizer(" ".join(TEXTS[:2] * 14))["input_ids"], *range(100, 200)][: CONTEXT + 2]


def check(output: RequestOutput, reference: Reference, num_likeliest: int = 3) -> None:
    """Every token is scored, with the likeliest tokens, and the text of each is its own."""
    ids, rows = output.prompt_token_ids, reference.logprobs(output.prompt_token_ids)
    assert output.prompt_logprobs is not None
    assert len(output.prompt_logprobs) == len(ids)
    assert output.prompt_logprobs[0] is None
    count = rows.shape[1] if num_likeliest == -1 else num_likeliest
    for token_id, step, row in zip(ids[1:], output.prompt_logprobs[1:], rows, strict=False):
        assert step is not None
        assert next(iter(step)) == token_id
        assert len(step) in (count, count + 1)
        values = torch.tensor([each.logprob for each in step.values()], dtype=torch.float64)
        assert (values - row[list(step)]).abs().max() < TOLERANCE
        if count:
            assert row[[each for each in step if each != token_id]].min() >= row.topk(count).values[-1] - TOLERANCE
            place = [key for key, each in step.items() if each.rank == 1]
            assert row[place[0]] >= row.max() - TOLERANCE
        if step[token_id].rank is None:
            assert count < rows.shape[1]


@pytest.mark.parametrize("num_likeliest", [0, 3, -1])
def test_prompts_as_texts_and_as_ids(llm: LLM, reference: Reference, num_likeliest: int) -> None:
    params = SamplingParams(max_tokens=0, prompt_logprobs=num_likeliest)
    prompts = TEXTS if num_likeliest >= 0 else TEXTS[-1:]
    texts = llm.generate(prompts, params)
    ids = llm.generate([list(output.prompt_token_ids) for output in texts], params)
    for text, given, output in zip(texts, prompts, ids, strict=True):
        check(text, reference, num_likeliest)
        assert text.prompt == given
        assert list(text.prompt_token_ids) == reference.tokenizer(given)["input_ids"]
        assert output.prompt_logprobs == text.prompt_logprobs
        assert [(answer.token_ids, answer.finish_reason) for answer in text.outputs] == [((), "length")]
        decoded = [
            step[token_id].decoded_token for token_id, step in zip(text.prompt_token_ids, text.prompt_logprobs or (), strict=True) if step
        ]
        assert decoded[:1] == [reference.tokenizer.decode(text.prompt_token_ids[1:2])]


@pytest.mark.parametrize("place", PLACES)
def test_places_and_schedules(place: str, novels_opt: Path, reference: Reference, tmp_path: Path) -> None:
    """Short and long prompts that begin alike, scored with and without answers, several of them; chunks are smaller than prompts."""
    options = {"dtype": "float32", "offload_dir": str(tmp_path), **PLACES[place]}
    with LLM(novels_opt, **options) as llm:
        long = " ".join(TEXTS[:2] * 3)
        prompts = [long, long + " and the wind", long + " and the wind blew", *TEXTS[2:]]
        params = [SamplingParams(max_tokens=2 * (n % 3), prompt_logprobs=3, n=1 + n % 2, temperature=0, ignore_eos=True) for n in range(5)]
        plain = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
        outputs = llm.generate([*prompts, *prompts], [*params, *[plain] * 5])
        classified = llm.classify(prompts, [" the", " the old man", " a", "\n"])
    for output, own, alone in zip(outputs, params, outputs[5:], strict=False):
        check(output, reference)
        for answer in output.outputs:
            assert answer.token_ids == alone.outputs[0].token_ids[: own.max_tokens]
        assert alone.prompt_logprobs is None
    for prompt, output in zip(prompts, classified, strict=True):
        check_choices(output, prompt, [" the", " the old man", " a", "\n"], reference)


def check_choices(output: Any, prompt: str, choices: Sequence[str], reference: Reference) -> None:
    scores = output.outputs
    for place, choice in enumerate(choices):
        context, continuation = reference.encode_pair(prompt, choice)
        wanted, is_greedy = reference.score(context, continuation)
        assert list(output.prompt_token_ids) == context
        assert scores.logprobs[place] == pytest.approx(wanted, abs=TOLERANCE * len(continuation))
        assert (scores.num_tokens[place], scores.is_greedy[place]) == (len(continuation), is_greedy)
    largest = max(scores.logprobs)
    total = sum(math.exp(each - largest) for each in scores.logprobs)
    assert scores.probs == pytest.approx([math.exp(each - largest) / total for each in scores.logprobs])
    assert sum(scores.probs) == pytest.approx(1)
    assert scores.best == scores.logprobs.index(largest)


def test_prompts_of_one_token_and_of_the_whole_context(llm: LLM, reference: Reference, full: list[int]) -> None:
    one, whole = llm.generate([full[:1], full[:CONTEXT]], SCORE)
    assert one.prompt_logprobs == [None]
    check(whole, reference)


def test_nothing_is_computed_where_nothing_is_asked_for(llm: LLM, full: list[int]) -> None:
    (scored, bare), passes = llm.generate([full[:5], full[:5]], [SCORE, SamplingParams(max_tokens=0, n=2)]), llm.report().num_passes
    assert passes == 1
    assert [(answer.text, answer.finish_reason) for answer in [*scored.outputs, *bare.outputs]] == [("", "length")] * 3
    assert llm.generate([full[:5]], SamplingParams(max_tokens=0))[0].prompt_logprobs is None
    assert llm.report().num_passes == 0


def test_scores_beside_several_answers(llm: LLM, reference: Reference) -> None:
    params = SamplingParams(n=3, max_tokens=5, seed=1, prompt_logprobs=3, logprobs=2)
    scored = llm.generate(TEXTS, params)
    plain = llm.generate(TEXTS, SamplingParams(n=3, max_tokens=5, seed=1, logprobs=2))
    for output, other in zip(scored, plain, strict=True):
        check(output, reference)
        assert [answer.token_ids for answer in output.outputs] == [answer.token_ids for answer in other.outputs]
        assert all(len(answer.logprobs or ()) == len(answer.token_ids) for answer in output.outputs)


def test_a_scored_prompt_with_several_answers_is_computed_once(llm: LLM, full: list[int]) -> None:
    """But for the page in which answers begin."""
    llm.generate([full[:100]], SamplingParams(n=3, max_tokens=2, prompt_logprobs=0))
    assert llm.report().shared_prompt_tokens == 2 * (99 // 16 * 16)


PROMPTS = [TEXTS[0], TEXTS[0] + " ", "CHAPTER I.\n\n", TEXTS[2], "The answer is:  "]
CHOICES = [" and", "and", " and", " and the", " and the wind", "\n", "\N{WATER WAVE}", "Yes", "No", " x" * 9]


@pytest.mark.parametrize("choices", [CHOICES, CHOICES[:1], CHOICES[3:5], ["Yes", "No"], ["A", "B", "C", "D"]], ids=len)
def test_choices_are_scored_as_by_the_harness(llm: LLM, reference: Reference, choices: list[str]) -> None:
    """Of one and of several tokens, equal ones, beginnings of others; texts that end in spaces."""
    outputs = llm.classify(PROMPTS, choices)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        check_choices(output, prompt, choices, reference)


def test_choices_of_token_ids(llm: LLM, reference: Reference) -> None:
    prompts = llm.encode(TEXTS)
    choices = [[17], [17, 300], [17, 300, 5], [300], [17, 301], [17], [17, 300, 5]]
    for prompt, output in zip(prompts, llm.classify(prompts, choices), strict=True):
        for place, choice in enumerate(choices):
            wanted, is_greedy = reference.score(prompt, choice)
            assert output.outputs.logprobs[place] == pytest.approx(wanted, abs=TOLERANCE * len(choice))
            assert output.outputs.is_greedy[place] == is_greedy
        assert output.outputs.logprobs[0] == output.outputs.logprobs[5], "equal choices have equal scores, to the last digit"
        assert output.outputs.logprobs[2] == output.outputs.logprobs[6]


def test_what_greedy_generation_says_is_greedy(llm: LLM) -> None:
    answers = [output.outputs[0].token_ids for output in llm.generate(TEXTS, SamplingParams(temperature=0, max_tokens=4, ignore_eos=True))]
    prompts = llm.encode(TEXTS)
    choices = [[list(ids[:n]) for n in (1, 2, 4)] + [[*ids[:3], (ids[3] + 1) % 8192], [(ids[0] + 1) % 8192]] for ids in answers]
    for output in llm.classify(prompts, choices):
        assert output.outputs.is_greedy == [True, True, True, False, False]


def test_choices_at_the_end_of_the_context(llm: LLM, reference: Reference, full: list[int]) -> None:
    """The last token needs no place."""
    for room in (0, 1, 2):
        prompt, choice = full[: CONTEXT - room], full[CONTEXT - room : CONTEXT + 1]
        choices = [choice, [*choice[:-1], 9]]
        (output,) = llm.classify([prompt], choices)
        for each, logprob in zip(choices, output.outputs.logprobs, strict=True):
            assert logprob == pytest.approx(reference.score(prompt, each)[0], abs=TOLERANCE * len(each))


@pytest.mark.parametrize("prompt", ["It was\n", "She said"])
def test_lines_are_scored_as_the_harness_reads_them(llm: LLM, reference: Reference, tmp_path: Path, prompt: str) -> None:
    """Choices in a bare line, in a chat, and as continuations in OpenAI's completions, as `local-completions` reads these."""
    choices = [" a", " a dark", " the"]
    pairs = [reference.encode_pair(prompt, choice) for choice in choices]
    echo = {
        "prompt": [[*context, *own] for context, own in pairs],
        "max_tokens": 1,
        "logprobs": 1,
        "temperature": 0,
        "seed": 1,
        "echo": True,
    }
    lines = [{"prompt": prompt, "choices": choices}, {"custom_id": "c", "method": "POST", "url": "/v1/completions", "body": echo}]
    bare, openai = answer_lines(llm, lines, tmp_path / "job")
    for label, choice, (context, own) in zip(bare["labels"], openai["response"]["body"]["choices"], pairs, strict=True):
        wanted, is_greedy = reference.score(context, own)
        logprobs = choice["logprobs"]
        values, likeliest = (logprobs[name][len(context) : -1] for name in ("token_logprobs", "top_logprobs"))
        assert sum(values) == pytest.approx(wanted, abs=TOLERANCE * len(own))
        assert all(value == max(each.values()) for value, each in zip(values, likeliest, strict=True)) == is_greedy
        assert label["logprob"] == pytest.approx(wanted, abs=TOLERANCE * len(own))
        assert label["is_greedy"] == is_greedy


def test_offsets_of_an_echo(llm: LLM, reference: Reference, tmp_path: Path) -> None:
    """Each token's text is where its offset says; parts of a character are where the character is."""
    lines = [
        {
            "custom_id": str(n),
            "method": "POST",
            "url": "/v1/completions",
            "body": {"prompt": prompt, "echo": True, "logprobs": 0, "max_tokens": 3},
        }
        for n, text in enumerate(TEXTS)
        for prompt in (text, llm.encode(text)[0])
    ]
    for line, record in zip(lines, answer_lines(llm, lines, tmp_path / "job"), strict=True):
        (choice,) = record["response"]["body"]["choices"]
        tokens, offsets, text = choice["logprobs"]["tokens"], choice["logprobs"]["text_offset"], choice["text"]
        prompt = line["body"]["prompt"]
        assert text.startswith(prompt if isinstance(prompt, str) else reference.tokenizer.decode(prompt))
        assert len(tokens) == len(offsets) == len(choice["logprobs"]["token_logprobs"])
        assert offsets == sorted(offsets)
        for token, offset in zip(tokens, offsets, strict=True):
            assert "\ufffd" in token or text[offset : offset + len(token)] == token
        assert "".join(text[a:b] for a, b in zip(offsets, [*offsets[1:], len(text)], strict=True)) == text


def test_an_echo_with_a_special_token_before_half_a_character(llm: LLM, tmp_path: Path) -> None:
    (end,) = llm.eos_token_ids
    half = llm.encode("\N{WATER WAVE}", add_special_tokens=False)[0][0]
    prompt = [*llm.encode("The", add_special_tokens=False)[0], end, half]
    body = {"prompt": prompt, "echo": True, "logprobs": 0, "max_tokens": 0}
    line = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": body}
    (record,) = answer_lines(llm, [line], tmp_path / "job")
    (choice,) = record["response"]["body"]["choices"]
    assert choice["text"] == "The</s>\ufffd"
    assert choice["logprobs"]["tokens"] == ["The", "</s>", "\ufffd"]
    assert choice["logprobs"]["text_offset"] == [0, 3, 7]

"""Fields of requests: what is served, what is ignored, what is refused by name; the same in all forms where it is the same."""

from __future__ import annotations

from typing import Any

import pytest

from flexgen.api.bodies import parse_chat, parse_completion
from flexgen.api.job_request import JobRequest
from flexgen.api.plain import PlainForm
from flexgen.chat import Chat
from flexgen.errors import RequestError
from flexgen.request import SamplingParams

DEFAULTS = SamplingParams(temperature=0.7, max_tokens=None)
MESSAGES = [{"role": "user", "content": "Hi"}]
LINE = JobRequest(line_number=1, digest=1, form=PlainForm(defaults=DEFAULTS))


def completion(**fields: Any) -> JobRequest:
    return parse_completion(LINE, {"prompt": "p", **fields}, DEFAULTS)


def chat(**fields: Any) -> JobRequest:
    return parse_chat(LINE, {"messages": MESSAGES, **fields}, DEFAULTS)


@pytest.fixture(params=[completion, chat], ids=["completion", "chat"])
def parse(request: pytest.FixtureRequest) -> Any:
    """A request from fields beside a prompt."""
    return request.param


# -- both endpoints -----------------------------------------------------------------------------------------------------------------------


def test_sampling_fields(parse: Any) -> None:
    given = {
        "n": 3, "presence_penalty": 0.5, "frequency_penalty": -1, "repetition_penalty": 1.1, "temperature": 0, "top_p": 0.5, "top_k": -1,
        "min_p": 0.1, "seed": -3, "stop": ["a", "b"], "stop_token_ids": [1, 2], "bad_words": ["x"], "ignore_eos": True, "max_tokens": 5,
        "min_tokens": 2, "include_stop_str_in_output": True, "skip_special_tokens": False, "allowed_token_ids": [7],
    }  # fmt: skip
    request = parse(**given, logit_bias={"5": -100, "6": 2.5})
    assert request.params == SamplingParams(**given, logit_bias={5: -100, 6: 2.5})
    assert request.states_max_tokens
    assert request.ignored == ()


def test_defaults(parse: Any) -> None:
    request = parse()
    assert request.params == DEFAULTS
    assert not request.states_max_tokens
    assert not request.return_token_ids
    assert request.model is None


@pytest.mark.parametrize("stop", ["x", ["x"]])
def test_stop_is_a_text_or_a_list(parse: Any, stop: object) -> None:
    assert parse(stop=stop).params.stop == ("x",)


def test_more_stops_than_openai_takes(parse: Any) -> None:
    assert parse(stop=list("abcdef")).params.stop == tuple("abcdef")


HARMLESS = {"user": "u", "metadata": {"a": [1]}, "store": True, "service_tier": "flex", "stream": False, "prompt_cache_key": "k"}


def test_harmless_fields_are_accepted_and_named(parse: Any) -> None:
    request = parse(**HARMLESS)
    assert sorted(request.ignored) == sorted(HARMLESS)
    assert request.params == parse().params


@pytest.mark.parametrize(
    "fields",
    [
        {"echo": False}, {"presence_penalty": 0.0}, {"repetition_penalty": 1}, {"stop": []}, {"stop": None}, {"suffix": ""},
        {"response_format": {"type": "text"}}, {"tools": []}, {"tool_choice": "none"}, {"tool_choice": "auto"}, {"functions": []},
        {"parallel_tool_calls": True}, {"min_tokens": 0}, {"best_of": 1}, {"n": 2, "best_of": 2}, {"modalities": ["text"]},
        {"length_penalty": 1.0}, {"verbosity": "medium"}, {"logit_bias": {}}, {"logprobs": None},
        dict.fromkeys(("n", "temperature", "max_tokens", "stop_token_ids", "return_token_ids", "ignore_eos", "model", "user", "tools")),
    ],
    ids=str,
)  # fmt: skip
def test_values_that_ask_for_nothing_are_accepted(parse: Any, fields: dict[str, Any]) -> None:
    wanted = parse(n=fields.get("n") or 1)
    request = parse(**fields)
    assert (request.params, request.prompt) == (wanted.params, wanted.prompt)


def test_null_is_not_counted_as_given(parse: Any) -> None:
    assert parse(user=None, tools=None).ignored == ()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("best_of", 3), ("best_of", True), ("stream", True), ("suffix", "s"), ("functions", [{}]), ("function_call", {"name": "f"}),
        ("response_format", {"type": "structural_tag"}), ("documents", [{}]), ("audio", {}),
        ("modalities", ["text", "audio"]), ("web_search_options", {}), ("chat_template", "{{ x }}"), ("use_beam_search", True),
        ("truncate_prompt_tokens", 5), ("detokenize", False), ("verbosity", "low"), ("length_penalty", True),
    ],
)  # fmt: skip
def test_effects_that_are_not_there_are_refused_by_name(parse: Any, field: str, value: object) -> None:
    with pytest.raises(RequestError, match=field) as caught:
        parse(**{field: value})
    assert (caught.value.code, caught.value.param) == ("unsupported_field", field)


@pytest.mark.parametrize("field", ["max_length", "", "n ", "x" * 1000])
def test_an_unknown_field_is_refused_by_name(parse: Any, field: str) -> None:
    with pytest.raises(RequestError, match="unknown field") as caught:
        parse(**{field: None})
    assert (caught.value.code, caught.value.param) == ("unknown_field", field[:80])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt_logprobs", -2), ("prompt_logprobs", True),
        ("max_tokens", -1), ("max_tokens", 1.5), ("max_tokens", "5"), ("max_tokens", True), ("temperature", -0.1),
        ("temperature", "0"), ("temperature", True), ("top_p", 0), ("top_p", 1.1), ("top_k", -2), ("top_k", 1.5), ("seed", 2**64),
        ("seed", 0.5), ("ignore_eos", 1), ("stop_token_ids", 5), ("stop_token_ids", [-1]), ("stop_token_ids", ["a"]),
        ("skip_special_tokens", "yes"), ("return_token_ids", 1), ("max_tokens", 10**400), ("temperature", 10**400), ("n", 0), ("n", True),
        ("n", 1.5), ("n", 10**9), ("stop", 5), ("stop", [5]), ("stop", [""]), ("stop", ""), ("logit_bias", []), ("logit_bias", {"a": 1}),
        ("logit_bias", {"1": "2"}), ("logit_bias", {"1": 10**400}), ("min_p", 2), ("presence_penalty", 3), ("bad_words", "x"),
        ("allowed_token_ids", []), ("model", 5),
    ],
    ids=lambda value: str(value)[:10],
)  # fmt: skip
def test_values_out_of_range_are_refused_by_name(parse: Any, field: str, value: object) -> None:
    with pytest.raises(RequestError, match=field) as caught:
        parse(**{field: value})
    assert caught.value.param == field


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("ignore_eos", {"a": [None, True]}, 'ignore_eos must be true or false, not {"a": [null, true]}'),
        ("temperature", True, "temperature must be a finite number of at least 0, not true"),
        ("model", 5, "model must be a text"),
        ("stop", "", "stop must be made of texts that are not empty, not the text ''"),
        ("stop", 5, "stop must be a text or a list of texts, not 5"),
        ("stream", True, "stream is not supported (only false)"),
        (
            "structured_outputs",
            {"json_object": True, "disable_fallback": True},
            "structured_outputs: disable_fallback=true is not supported yet",
        ),
        ("modalities", ["audio"], 'modalities is not supported (only ["text"])'),
    ],
    ids=lambda value: str(value)[:20],
)
def test_messages_have_values_as_json_has_them(parse: Any, field: str, value: object, said: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse(**{field: value})
    assert str(caught.value) == said


def test_the_model_is_reported(parse: Any) -> None:
    assert parse(model="gpt-4o").model == "gpt-4o"


# -- completions --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [("p", "p"), ("", ""), ([1, 2], (1, 2)), ([], ()), (["p"], "p"), ([[1, 2]], (1, 2)), ([1.0, 2], (1, 2)), ([10**400], (10**400,))],
)
def test_prompts(prompt: object, wanted: object) -> None:
    assert completion(prompt=prompt).prompt == wanted


@pytest.mark.parametrize("prompt", [None, 5, True, {}, {"text": "p"}, [1, "a"], [1.5], [True], ["a", [1]], [[1], ["a"]], [[1], 2], [None]])
def test_what_is_no_prompt(prompt: object) -> None:
    with pytest.raises(RequestError) as caught:
        completion(prompt=prompt)
    assert caught.value.param == "prompt"


@pytest.mark.parametrize(("value", "wanted"), [(None, None), (False, None), (0, 0), (5, 5), (5.0, 5)])
def test_logprobs_of_completions_are_a_number(value: object, wanted: object) -> None:
    assert completion(logprobs=value).params.logprobs == wanted


@pytest.mark.parametrize("value", [True, -2, "5", 1.5])
def test_logprobs_of_completions_that_are_none(value: object) -> None:
    with pytest.raises(RequestError) as caught:
        completion(logprobs=value)
    assert caught.value.param == "logprobs"


@pytest.mark.parametrize(
    ("prompt", "first", "more"), [(["a", "b", ""], "a", ("b", "")), ([[1], [2, 3]], (1,), ((2, 3),)), ([[1.0], []], (1,), ((),))]
)
def test_several_prompts(prompt: list[Any], first: object, more: object) -> None:
    request = completion(prompt=prompt, n=2, max_tokens=3)
    assert (request.prompt, request.more_prompts) == (first, more)
    assert [(each.prompt, each.more_prompts) for each in request.of_each_prompt()[1:]] == [(each, ()) for each in request.more_prompts]
    assert all(each.params == request.params for each in request.of_each_prompt())


def test_several_prompts_have_a_bound_on_their_answers() -> None:
    assert len(completion(prompt=["a"] * 4, n=4096).of_each_prompt()) == 4
    with pytest.raises(RequestError, match="at most 16,384 answers") as caught:
        completion(prompt=["a"] * 5, n=4096)
    assert caught.value.param == "prompt"


def test_nothing_but_a_score() -> None:
    for request in (completion(max_tokens=0, prompt_logprobs=2), chat(max_completion_tokens=0, prompt_logprobs=2)):
        assert (request.params.max_tokens, request.params.prompt_logprobs, request.states_prompt_logprobs) == (0, 2, True)


@pytest.mark.parametrize(
    ("fields", "echo", "prompt_logprobs", "stated"),
    [
        ({}, False, None, False), ({"echo": None}, False, None, False), ({"echo": True}, True, None, False),
        ({"logprobs": 3}, False, None, False), ({"echo": True, "logprobs": 3}, True, 3, False),
        ({"echo": True, "logprobs": 0}, True, 0, False),
        ({"echo": True, "logprobs": False}, True, None, False), ({"echo": True, "logprobs": 3, "prompt_logprobs": 1}, True, 1, True),
        ({"echo": True, "prompt_logprobs": 0}, True, 0, True), ({"prompt_logprobs": -1}, False, -1, True),
    ],
)  # fmt: skip
def test_echo_scores_the_prompt(fields: dict[str, Any], echo: bool, prompt_logprobs: int | None, stated: bool) -> None:
    """As in vLLM: log probabilities of an answer that begins with the prompt are of all its tokens."""
    request = completion(**fields)
    assert (request.echo, request.params.prompt_logprobs, request.states_prompt_logprobs) == (echo, prompt_logprobs, stated)


@pytest.mark.parametrize("value", [0, 1, "yes"])
def test_echo_is_true_or_false(value: object) -> None:
    with pytest.raises(RequestError, match="echo must be true or false"):
        completion(echo=value)


def test_chats_have_no_echo() -> None:
    with pytest.raises(RequestError, match="echo is not supported") as caught:
        chat(echo=True)
    assert caught.value.code == "unsupported_field"


# -- choices ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (["Yes", " No"], ("Yes", " No")), (["a"], ("a",)), (["a", "a"], ("a", "a")), ([[1, 2], [3]], ((1, 2), (3,))), ([[1.0]], ((1,),)),
        (["a"] * 16384, ("a",) * 16384),
    ],
    ids=lambda value: str(value)[:20],
)  # fmt: skip
def test_choices(parse: Any, given: list[Any], wanted: object) -> None:
    request = parse(choices=given, model="m", user="u")
    assert request.choices == wanted
    assert (request.model, request.ignored) == ("m", ("user",))


@pytest.mark.parametrize(
    "given", [[], "Yes", {"a": 1}, 5, True, [""], ["a", ""], [[]], ["a", 5], [[1.5]], [["a"]], [None], [[True]], ["a"] * 16385],
    ids=lambda value: str(value)[:20],
)  # fmt: skip
def test_what_is_no_list_of_choices(parse: Any, given: object) -> None:
    with pytest.raises(RequestError, match="choices must be a list of 1 to 16,384 texts") as caught:
        parse(choices=given)
    assert caught.value.param == "choices"


@pytest.mark.parametrize(
    "fields",
    [
        {"max_tokens": 1}, {"max_tokens": 0}, {"temperature": 0}, {"n": 1}, {"logprobs": True}, {"seed": 5}, {"stop": []}, {"best_of": 1},
        {"prompt_logprobs": 0}, {"return_token_ids": True}, {"min_tokens": 0}, {"logit_bias": {}}, {"skip_special_tokens": True},
    ],
    ids=str,
)  # fmt: skip
def test_nothing_is_generated_beside_choices(parse: Any, fields: dict[str, Any]) -> None:
    (name,) = fields
    with pytest.raises(RequestError, match=f"so {name} has no meaning") as caught:
        parse(choices=["a"], **fields)
    assert (caught.value.code, caught.value.param) == ("unsupported_field", name)


def test_null_and_false_ask_for_nothing_beside_choices(parse: Any) -> None:
    nothing = {"echo": False, "return_token_ids": False, "logprobs": False, "ignore_eos": False, "temperature": None, "max_tokens": None}
    assert parse(choices=["a"], **nothing).choices == ("a",)
    assert parse(choices=None, max_tokens=3).choices == ()


def test_choices_stand_beside_one_prompt() -> None:
    with pytest.raises(RequestError, match="beside one prompt"):
        completion(prompt=["a", "b"], choices=["c"])
    with pytest.raises(RequestError, match="so echo has no meaning"):
        completion(choices=["a"], echo=True)
    with pytest.raises(RequestError, match="so max_completion_tokens has no meaning"):
        chat(choices=["a"], max_completion_tokens=5)


@pytest.mark.parametrize("field", ["messages", "top_logprobs", "max_completion_tokens", "chat_template_kwargs"])
def test_completions_know_no_fields_of_chats(field: str) -> None:
    with pytest.raises(RequestError, match="unknown field"):
        completion(**{field: 1})


# -- chats --------------------------------------------------------------------------------------------------------------------------------


def test_a_chat() -> None:
    request = chat(
        add_generation_prompt=False, continue_final_message=True, chat_template_kwargs={"enable_thinking": False}, reasoning_effort="low"
    )
    assert request.prompt == Chat(
        messages=tuple(MESSAGES),
        add_generation_prompt=False,
        continue_final_message=True,
        chat_template_kwargs={"enable_thinking": False, "reasoning_effort": "low"},
    )


def test_max_completion_tokens_is_max_tokens() -> None:
    request = chat(max_completion_tokens=7)
    assert request.params.max_tokens == 7
    assert request.states_max_tokens
    assert chat(max_completion_tokens=7, max_tokens=7.0).params.max_tokens == 7
    with pytest.raises(RequestError, match="the same"):
        chat(max_completion_tokens=7, max_tokens=8)
    assert chat(max_completion_tokens=None, max_tokens=8).params.max_tokens == 8


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({}, None),
        ({"logprobs": False}, None),
        ({"logprobs": False, "top_logprobs": 0}, None),
        ({"logprobs": True}, 0),
        ({"logprobs": True, "top_logprobs": 3}, 3),
        ({"logprobs": True, "top_logprobs": 3.0}, 3),
        ({"logprobs": True, "top_logprobs": -1}, -1),
    ],
)
def test_logprobs_of_chats(fields: dict[str, Any], wanted: int | None) -> None:
    assert chat(**fields).params.logprobs == wanted


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"logprobs": 5}, "logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": True}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": -2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 10**400}, "logprobs"),
        ({"max_completion_tokens": -1}, "max_completion_tokens"),
        ({"max_completion_tokens": 10**400}, "max_completion_tokens"),
        ({"max_completion_tokens": "5"}, "max_completion_tokens"),
        ({"add_generation_prompt": 1}, "add_generation_prompt"),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"chat_template_kwargs": []}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"messages": 1}}, "chat_template_kwargs"),
        ({"reasoning_effort": 5}, "reasoning_effort"),
        ({"messages": []}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"prompt": "p"}, "prompt"),
        ({"add_special_tokens": True}, "add_special_tokens"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_chats(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        chat(**fields)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("text", "the text to continue is called 'prompt'"),
        ("max_token", "did you mean 'max_tokens'?"),
        ("Temperature", "did you mean 'temperature'?"),
    ],
)
def test_an_unknown_field_has_a_hint(name: str, said: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_completion(LINE, {"prompt": "a", name: 1}, SamplingParams())
    assert said in str(caught.value)

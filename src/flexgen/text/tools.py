"""Calls of tools in answers: parsed as the model's response template says, and required by a grammar of the model's own syntax.

How a model writes calls is not known here: transformers parses them, and the chat template shows how they are written.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import types
from collections.abc import Mapping, Sequence
from typing import Any

from flexgen.base.scalars import in_json
from flexgen.base.structured import StructuredOutputsParams
from flexgen.base.tool_calls import AnswerMessage, ToolCall
from flexgen.chat import Templates, ToolUse
from flexgen.chat.tools import tool_name
from flexgen.errors import RequestError, is_failure
from flexgen.outputs import CompletionOutput, RequestOutput
from flexgen.request import SamplingParams
from flexgen.text.constraint_words import ConstraintError
from flexgen.text.guides import JSON_OPTIONS, Guides
from flexgen.text.tokenizer import Tokenizer
from flexgen.text.tool_syntax import PROBED_CALL, ToolSyntax, find_syntax, parameters_of, probes, question

_FOLLOWING = "\N{INVISIBLE SEPARATOR}"  # a text that no answer ends in
_REASONING = ("reasoning_content", "thinking", "reasoning")


class Tools:
    """The calls of tools in a model's answers.

    Args:
        name: The name of the model, for messages.
        model_type: The type of the model, as its config has it.
        tokenizer: The model's tokenizer; None where it has none.
        templates: The model's chat templates.
        guides: The maker of guides, which knows what tokens are special.
        eos_token_ids: The tokens that end an answer.
    """

    def __init__(
        self,
        name: str,
        model_type: str,
        tokenizer: Tokenizer | None,
        templates: Templates,
        guides: Guides,
        eos_token_ids: frozenset[int] = frozenset(),
    ) -> None:
        self._name, self._model_type, self._tokenizer, self._templates, self._guides = name, model_type, tokenizer, templates, guides
        self._eos_token_ids = eos_token_ids

    def params(self, params: SamplingParams, use: ToolUse) -> SamplingParams:
        """Return the parameters of a request with tools, which is constrained to calls where they are required.

        Raises:
            RequestError: The model's calls cannot be parsed or constrained, or the request is constrained otherwise.
        """
        if self._response_template is None:
            message = f"tools: {self._name} has no response template, without which calls of tools cannot be told from text"
            raise RequestError(message, code="unsupported_field", param="tools")
        if params.structured_outputs is not None:
            message = "tools: an answer that must consist of something else calls no tools: leave out one of both"
            raise RequestError(message, code="unsupported_field", param="tools")
        if not use.required:
            return params
        syntax = self._syntax
        if isinstance(syntax, RequestError):
            raise syntax
        grammar = syntax.grammar(use.required, parallel=use.parallel, literal=self._guides.literal, json_options=JSON_OPTIONS)
        constraint = StructuredOutputsParams(grammar=grammar)
        try:
            self._guides.guide(constraint)
        except ConstraintError as error:
            raise self._refused(use, error) from error
        return dataclasses.replace(params, structured_outputs=constraint)

    def _refused(self, use: ToolUse, error: ConstraintError) -> RequestError:
        """Return the error of required calls that no grammar can be made for, which names the tool whose parameters are to blame."""
        for place, tool in enumerate(use.tools):
            if tool not in use.required:
                continue
            try:
                self._guides.guide(StructuredOutputsParams(json=parameters_of(tool, JSON_OPTIONS)))
            except ConstraintError as own:
                param = f"tools[{place}].function.parameters"
                said = f"{param} of {tool_name(tool)!r} cannot be met: {own.reason}"
                return RequestError(said, code=own.code, param=param)
        return RequestError(f"tools: calls cannot be required: {error.reason}", code=error.code, param="tools")

    def with_messages(self, output: RequestOutput, use: ToolUse) -> RequestOutput:
        """Return the answers to a request with tools as messages, too.

        An answer that is not what the response template describes, and one that was cut off within a call, stays text only.

        Raises:
            RequestError: An answer that was not cut off by its length has no call, although one is required.
        """
        assert self._tokenizer is not None
        prompt = self._tokenizer.decode(output.prompt_token_ids, skip_special_tokens=False)
        return dataclasses.replace(output, outputs=[self._with_message(each, prompt, use) for each in output.outputs])

    def _with_message(self, completion: CompletionOutput, prompt: str, use: ToolUse) -> CompletionOutput:
        assert self._tokenizer is not None
        text = self._tokenizer.decode(completion.token_ids, skip_special_tokens=False)
        message = self._parsed(prompt, text, use.tools)
        ended = completion.finish_reason == "stop"
        if message is not None and message.tool_calls and not (ended and completion.stop_reason is None):
            message = message if self._is_whole(prompt, text, use.tools) else None
        if use.required and ended and (message is None or not message.tool_calls):
            stopped = "" if completion.stop_reason is None else f", which {in_json(completion.stop_reason)} stopped"
            said = f"tool_choice requires a call, and none can be read in the answer{stopped}"
            raise RequestError(said, code="no_tool_call", param="tool_choice")
        return dataclasses.replace(completion, message=message)

    def _is_whole(self, prompt: str, text: str, tools: Sequence[Mapping[str, Any]]) -> bool:
        """Return whether an answer that was cut off was not cut within a call, so that what follows would be text."""
        longer = self._parsed(prompt, text + _FOLLOWING, tools)
        return longer is not None and _FOLLOWING in (longer.content or "")

    @functools.cached_property
    def _response_template(self) -> Mapping[str, Any] | None:
        """The tokenizer's own response template, or the one that transformers has for such models."""
        if self._tokenizer is None:
            return None
        hf: Any = self._tokenizer.hf
        if (own := getattr(hf, "response_template", None)) is not None:
            return own
        try:
            from transformers.cli.serving.utils import get_response_template

            model: Any = types.SimpleNamespace(config=types.SimpleNamespace(model_type=self._model_type))
            return get_response_template(hf, model)
        except (ImportError, AttributeError):  # not a documented interface
            return None

    @functools.cached_property
    def _syntax(self) -> ToolSyntax | RequestError:
        """How the model writes calls, or the error of requests that require one."""
        prompt, text, one, two = self._templates.render([question(), *probes()])
        for each in (prompt, text, one):
            if isinstance(each, RequestError):
                return RequestError(f"tool_choice: {each}", code=each.code, param="tool_choice")
        assert isinstance(prompt, str)
        assert isinstance(text, str)
        assert isinstance(one, str)
        assert self._tokenizer is not None
        ends = [self._tokenizer.decode([each], skip_special_tokens=False) for each in self._eos_token_ids]
        syntax = find_syntax(text, one, two if isinstance(two, str) else None, [each for each in ends if each])
        name, arguments = PROBED_CALL
        parsed = None if syntax is None else self._parsed(prompt, syntax.example, ())
        if syntax is None or parsed is None or parsed.tool_calls != (ToolCall(name=name, arguments=json.dumps(arguments)),):
            message = f"tool_choice: {self._name} does not write calls of tools as a name and JSON, so they cannot be required"
            return RequestError(message, code="unsupported_field", param="tool_choice")
        return syntax

    def _parsed(self, prompt: str, text: str, tools: Sequence[Mapping[str, Any]]) -> AnswerMessage | None:
        assert self._tokenizer is not None
        hf: Any = self._tokenizer.hf
        try:
            return _message(hf.parse_response(text, self._response_template, prefix=prompt, tools=list(tools)))
        except BaseException as error:
            if not is_failure(error):
                raise
            return None


def _message(parsed: Mapping[str, Any]) -> AnswerMessage:
    """Return what `parse_response` found as a message.

    Raises:
        Exception: It has another form.
    """
    calls = tuple(_call(each["function"]) for each in parsed.get("tool_calls") or ())
    content = parsed.get("content")
    reasoning = next((parsed[name] for name in _REASONING if parsed.get(name) is not None), None)
    if not isinstance(content, (str, type(None))) or not isinstance(reasoning, (str, type(None))):
        raise TypeError("content and reasoning are texts")
    return AnswerMessage(content=(content or None) if calls else (content or ""), reasoning=reasoning, tool_calls=calls)


def _call(function: Mapping[str, Any]) -> ToolCall:
    name, arguments = function["name"], function.get("arguments", {})
    if not isinstance(name, str):
        raise TypeError("the name of a tool is a text")
    return ToolCall(name=name, arguments=arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False))

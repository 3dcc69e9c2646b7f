"""The public face: names, versions, defaults, and that the command line and the keywords are one list."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import flexgen
from flexgen import errors
from flexgen.options import EngineOptions
from flexgen.outputs import ClassificationOutput, ClassificationRequestOutput, CompletionOutput, RequestOutput
from flexgen.request import SamplingParams

# vLLM's defaults; a script that relies on one must not change its meaning here.
VLLM_SAMPLING_DEFAULTS = {
    "n": 1,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "seed": None,
    "ignore_eos": False,
    "max_tokens": 16,
    "min_tokens": 0,
    "logprobs": None,
    "prompt_logprobs": None,
    "include_stop_str_in_output": False,
    "skip_special_tokens": True,
    "logit_bias": None,
    "allowed_token_ids": None,
    "structured_outputs": None,
}
VLLM_LISTS = {"stop", "stop_token_ids", "bad_words"}  # ours are tuples
VLLM_OUTPUT_FIELDS = {"index", "text", "token_ids", "cumulative_logprob", "logprobs", "finish_reason", "stop_reason"}
VLLM_REQUEST_FIELDS = {"request_id", "prompt", "prompt_token_ids", "prompt_logprobs", "outputs", "finished"}
VLLM_CLASSIFICATION_FIELDS = {"request_id", "prompt_token_ids", "outputs", "finished"}
# Options that `run` has no flag for: accepted as keywords only to be refused with a reason; a flag of `bench`.
NO_FLAG = {"trust_remote_code", "overlap", "devices"}


def test_every_public_name_exists_and_says_what_it_is() -> None:
    assert {"LLM", "SamplingParams", "RequestOutput", "CompletionOutput", "FlexGenError"} <= set(flexgen.__all__)
    for name in flexgen.__all__:
        value = getattr(flexgen, name)
        assert name == "__version__" or inspect.getdoc(value), name
        assert name in dir(flexgen)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        flexgen.no_such_name  # noqa: B018


def test_version_is_the_distribution_s(flexgen_command: Callable[..., str]) -> None:
    assert flexgen.__version__ == importlib.metadata.version("flexgen-engine")
    assert flexgen.__version__ in flexgen_command("--version")


def test_every_error_is_public_and_a_flexgen_error() -> None:
    tree = [value for value in vars(errors).values() if inspect.isclass(value)]
    assert all(issubclass(error, errors.FlexGenError) for error in tree)
    assert {error.__name__ for error in tree} <= set(flexgen.__all__)


def test_sampling_defaults_are_vllm_s() -> None:
    ours = {field.name: getattr(SamplingParams(), field.name) for field in dataclasses.fields(SamplingParams)}
    assert ours == VLLM_SAMPLING_DEFAULTS | dict.fromkeys(VLLM_LISTS, ())


def test_result_fields_are_vllm_s() -> None:
    assert {field.name for field in dataclasses.fields(CompletionOutput)} >= VLLM_OUTPUT_FIELDS
    assert {field.name for field in dataclasses.fields(RequestOutput)} >= VLLM_REQUEST_FIELDS
    assert {field.name for field in dataclasses.fields(ClassificationRequestOutput)} >= VLLM_CLASSIFICATION_FIELDS
    assert "probs" in {field.name for field in dataclasses.fields(ClassificationOutput)}


def test_every_engine_option_is_a_flag(flexgen_command: Callable[..., str]) -> None:
    flags = set(re.findall(r"--[a-z][a-z-]+", flexgen_command("run", "--help")))
    wanted = {"--" + field.name.replace("_", "-") for field in dataclasses.fields(EngineOptions) if field.name not in NO_FLAG}
    assert wanted <= flags, f"missing: {sorted(wanted - flags)}"


def test_llm_refuses_an_unknown_keyword_and_names_the_near_one(novels_opt: Path) -> None:
    with pytest.raises(errors.OptionError, match="host_mem"):
        flexgen.LLM(str(novels_opt), host_memory="1GiB")


def test_help_is_quick() -> None:
    """Processor time, because the wall clock of a shared machine is no measure; best of five."""
    seconds = []
    for _ in range(5):
        process = subprocess.Popen([Path(sys.executable).with_name("flexgen"), "--help"], stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0
        seconds.append(usage.ru_utime + usage.ru_stime)
    assert min(seconds) < 0.3

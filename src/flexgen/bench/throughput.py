"""`flexgen bench throughput`: random prompts of one length and answers of one length, reported in vLLM's figures and ours.

Loading is not timed.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from flexgen.errors import OptionError
from flexgen.llm import LLM
from flexgen.plan.workload import Workload
from flexgen.report.progress import Progress
from flexgen.request import SamplingParams, TokenRequest


def uniform_workload(llm: LLM, num_prompts: int, input_len: int, output_len: int) -> Workload:
    """Make a workload of `num_prompts` requests of the same lengths; see `uniform_job`."""
    return uniform_job(llm.max_model_len, num_prompts, input_len, output_len)


def uniform_job(context: int, num_prompts: int, input_len: int, output_len: int) -> Workload:
    """Make a workload of `num_prompts` requests of the same lengths, for a model with that context.

    Raises:
        OptionError: Prompt and answer do not fit the context.
    """
    if input_len + output_len > context:
        raise OptionError(f"prompt and answer of {input_len + output_len} tokens exceed the context of {context}")
    return Workload(prompt_lens=(input_len,) * num_prompts, output_lens=(output_len,) * num_prompts)


def run_throughput(llm: LLM, workload: Workload, *, on_progress: Callable[[Progress], None] | None = None) -> dict[str, Any]:
    """Answer random prompts (seeded by the model's seed) greedily, each with exactly the number of tokens asked for.

    Returns:
        vLLM's keys (elapsed_time, num_requests, total_num_tokens, requests_per_second, tokens_per_second) and those of `RunReport`.
    """
    llm.open(workload)
    start = time.perf_counter()
    results = list(llm.stream(random_requests(llm, workload), workload, on_progress=on_progress))
    elapsed = time.perf_counter() - start
    total = workload.prompt_tokens + sum(len(result.token_ids) for result in results)
    return {
        "elapsed_time": elapsed,
        "num_requests": len(results),
        "total_num_tokens": total,
        "requests_per_second": len(results) / elapsed,
        "tokens_per_second": total / elapsed,
        **dataclasses.asdict(llm.report()),
    }


def random_requests(llm: LLM, workload: Workload) -> Iterator[TokenRequest]:
    """Yield a request with a random prompt (seeded by the model's seed) for each of the lengths, answered greedily and in full."""
    rng = np.random.default_rng(llm.options.seed)
    for index, (prompt_len, output_len) in enumerate(zip(workload.prompt_lens, workload.output_lens, strict=True)):
        ids = rng.integers(0, llm.vocab_size, prompt_len).tolist()
        yield from llm.model.token_requests(index, ids, SamplingParams(temperature=0.0, max_tokens=output_len, ignore_eos=True))


def format_throughput(figures: dict[str, Any]) -> str:
    """Write the figures in vLLM's lines."""
    return (
        f"Throughput: {figures['requests_per_second']:.2f} requests/s, {figures['tokens_per_second']:.2f} total tokens/s, "
        f"{figures['output_tokens'] / figures['elapsed_time']:.2f} output tokens/s\n"
        f"Total num prompt tokens:  {figures['prompt_tokens']}\n"
        f"Total num output tokens:  {figures['output_tokens']}"
    )

"""How much of a compute-bound job is spent in products, and how fast these are beside a loop of nothing but the same products.

    python benchmarks/products.py --scratch DIR
    python benchmarks/products.py --scratch DIR --shape llama-tiny --cpu-compute int8
    python benchmarks/products.py --scratch DIR --cpu-compute int8 --turns 5

Weights are random and stay in memory; prompts are long and answers are a token.  The job runs twice, and its second run is measured, with a
clock around each product of more rows than there are requests (so without the head).  Before and after it, the linear layers of two decoder
layers of the shape are computed in turns, as many rows at a time as the engine's micro-batches have: once as the engine computes them, once
by torch's `linear` in bfloat16.  One JSON line.

With --turns the job is repeated in turns: as it is, and with inputs rounded anew for each product, where layers that take the same input
have its rounded numbers in common otherwise.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from record import commit, machine, versions
from shapes import SHAPES, Shape
from torch import nn
from torch.nn import functional

from flexgen import LLM, SamplingParams
from flexgen.checkpoint.repository import meta_model
from flexgen.formats.linear_names import is_linear_of_layer
from flexgen.kernels.int8.products import Int8Products, RoundedInput, RoundedRows, round_rows, rounded_bytes
from flexgen.kernels.threads import KernelThreads

DTYPE = torch.bfloat16
LAYERS = 2  # whose weights a loop uses in turns


@dataclass(slots=True)
class Clock:
    """What products took.

    Attributes:
        seconds: The time within products.
        flops: Their FLOPs.
        rows: The rows of each.
    """

    seconds: float = 0.0
    flops: float = 0.0
    rows: list[int] = field(default_factory=list[int])

    def timed(self, compute: Callable[[], Any], rows: int, features_in: int, features_out: int) -> Any:
        begun = time.perf_counter()
        result = compute()
        self.seconds += time.perf_counter() - begun
        self.flops += 2 * rows * features_in * features_out
        self.rows.append(rows)
        return result


@contextlib.contextmanager
def clock_around_products(few: int) -> Iterator[Clock]:
    """Yield a clock of all products of more than a `few` rows, whichever way they are computed."""
    clock, linear, write, rounded = Clock(), functional.linear, Int8Products.write, Int8Products.rounded

    def timed_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        rows = x.numel() // x.shape[-1]
        if rows <= few:
            return linear(x, weight, bias)
        return clock.timed(lambda: linear(x, weight, bias), rows, weight.shape[1], weight.shape[0])

    def timed_write(self: Int8Products, x: RoundedRows, weight: RoundedRows, *rest: Any) -> None:
        rows, features_in = x.codes.shape
        if rows <= few:
            return write(self, x, weight, *rest)
        return clock.timed(lambda: write(self, x, weight, *rest), rows, features_in, len(weight.codes))

    def timed_rounded(self: Int8Products, x: torch.Tensor) -> RoundedRows:
        begun = time.perf_counter()
        result = rounded(self, x)
        clock.seconds += (time.perf_counter() - begun) * (len(x) > few)
        return result

    functional.linear, Int8Products.write, Int8Products.rounded = timed_linear, timed_write, timed_rounded  # type: ignore[assignment]
    try:
        yield clock
    finally:
        functional.linear, Int8Products.write, Int8Products.rounded = linear, write, rounded  # type: ignore[method-assign]


@contextlib.contextmanager
def rounding_anew() -> Iterator[None]:
    """Have inputs rounded for each product."""
    is_of = RoundedInput.is_of
    RoundedInput.is_of = lambda *_: False  # type: ignore[method-assign]
    try:
        yield
    finally:
        RoundedInput.is_of = is_of  # type: ignore[method-assign]


def in_turns(job: Callable[[], object], turns: int, few: int) -> dict[str, float]:
    """Return the median seconds of the job and of its products, with inputs rounded once and with inputs rounded for each product."""
    taken: dict[str, list[float]] = {}
    for _ in range(turns):
        for name, how in (("once", contextlib.nullcontext), ("anew", rounding_anew)):
            begun = time.perf_counter()
            with how(), clock_around_products(few) as clock:
                job()
            taken.setdefault(f"seconds_{name}", []).append(time.perf_counter() - begun)
            taken.setdefault(f"product_seconds_{name}", []).append(clock.seconds)
    return {name: statistics.median(each) for name, each in taken.items()}


def linear_shapes(shape: Shape) -> list[tuple[int, int]]:
    """Return (out features, in features) of the linear layers of one decoder layer, in order."""
    model: Any = meta_model(shape.hf_config(), DTYPE)
    number = shape.config["num_hidden_layers"]
    linear = [module for name, module in model.named_modules() if type(module) is nn.Linear and is_linear_of_layer(name)]
    found = [(module.out_features, module.in_features) for module in linear]
    return found[: len(found) // number]


def loop_rate(shapes: list[tuple[int, int]], rows: int, seconds: float, *, int8: bool) -> float:
    """Return the FLOP/s of a loop of products, the median over rounds of LAYERS layers."""
    numbers = [torch.empty(shape, dtype=DTYPE).uniform_(-1, 1) for _ in range(LAYERS) for shape in shapes]
    inputs = {features_in: torch.empty(rows, features_in, dtype=DTYPE).uniform_(-1, 1) for _, features_in in shapes}
    flops = LAYERS * sum(2 * rows * features_out * features_in for features_out, features_in in shapes)
    with KernelThreads(torch.get_num_threads()) as threads:
        products = Int8Products(threads.over)
        if int8:
            weights = [_rounded(each) for each in numbers]
            outputs = {features_out: torch.empty(rows, features_out, dtype=DTYPE) for features_out, _ in shapes}

        def a_round() -> None:
            for place, number in enumerate(numbers):
                x = inputs[number.shape[1]]
                if int8:
                    products.write(products.rounded(x), weights[place], None, outputs[number.shape[0]])
                else:
                    functional.linear(x, number)

        a_round()
        taken: list[float] = []
        ends = time.perf_counter() + seconds
        while len(taken) < 3 or time.perf_counter() < ends:
            begun = time.perf_counter()
            a_round()
            taken.append(time.perf_counter() - begun)
    return flops / statistics.median(taken)


def _rounded(numbers: torch.Tensor) -> RoundedRows:
    rows, columns = numbers.shape
    rounded = RoundedRows.within(torch.empty(rounded_bytes(rows, columns), dtype=torch.int8), rows, columns)
    round_rows(numbers, rounded)
    return rounded


def measured(options: argparse.Namespace) -> dict[str, Any]:
    shape, int8 = SHAPES[options.shape], options.cpu_compute == "int8"
    folder = options.scratch / f"{shape.name}-config"
    shape.hf_config().save_pretrained(folder)
    rng = random.Random(0)
    prompts = [[rng.randint(10, 30000) for _ in range(options.prompt)] for _ in range(options.requests)]
    params = SamplingParams(temperature=0.0, max_tokens=options.answer, ignore_eos=True)
    shapes = linear_shapes(shape)

    def loops() -> dict[str, float]:
        own = loop_rate(shapes, options.rows, options.seconds, int8=int8)
        return {"own": own, "linear": loop_rate(shapes, options.rows, options.seconds, int8=False) if int8 else own}

    with LLM(
        folder, load_format="dummy", device="cpu", dtype="bfloat16", cpu_compute=options.cpu_compute, weights="host=1", kv="host=1",
        micro_batch_tokens=options.rows, offload_dir=str(options.scratch),
    ) as llm:  # fmt: skip
        llm.generate(prompts, params)
        before = loops()
        with clock_around_products(options.requests) as clock:
            begun = time.perf_counter()
            llm.generate(prompts, params)
            wall = time.perf_counter() - begun
        after = loops()
        turns = in_turns(lambda: llm.generate(prompts, params), options.turns if int8 else 0, options.requests)
    rate, loop = clock.flops / clock.seconds, (before["own"] + after["own"]) / 2
    return {
        "shape": shape.name, "cpu_compute": options.cpu_compute, "requests": options.requests, "prompt": options.prompt,
        "answer": options.answer, "rows": options.rows, "median_rows": statistics.median(clock.rows), "seconds": wall,
        "product_seconds": clock.seconds, "product_flops": clock.flops, "product_flops_per_s": rate,
        "loop_flops_per_s": [before["own"], after["own"]], "linear_loop_flops_per_s": [before["linear"], after["linear"]],
        "rate_over_loop": rate / loop, "share_between_products": 1 - clock.seconds / wall, **turns,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, required=True, help="a folder with room for the random weights")
    parser.add_argument("--shape", default="llama-3b", choices=[*SHAPES])
    parser.add_argument("--cpu-compute", default="auto", choices=["auto", "int8"])
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=512, help="tokens of each prompt")
    parser.add_argument("--answer", type=int, default=1, help="tokens of each answer")
    parser.add_argument("--rows", type=int, default=512, help="tokens of a micro-batch")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each loop")
    parser.add_argument("--turns", type=int, default=0, help="of the job in int8 with inputs rounded once, and for each product")
    options = parser.parse_args()
    print(json.dumps({**measured(options), **commit(), "machine": machine(), "versions": versions()}))


if __name__ == "__main__":
    main()

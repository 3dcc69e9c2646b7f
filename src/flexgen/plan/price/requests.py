"""The needs and the load of a job's requests: KV bytes by their number of tokens, and the work of a request over its whole life."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from flexgen.base.quantities import align_up
from flexgen.plan.model import ModelSpec
from flexgen.plan.policy import Policy
from flexgen.plan.price.work import PassLoad
from flexgen.plan.workload import Workload

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


def held_kv_bytes(spec: ModelSpec, page_tokens: int, max_tokens: int) -> Ints:
    """Return the bytes of the most pages that a sequence holds on its way to 0, 1, ... max_tokens tokens.

    Pages behind a window are freed, but the window begins and ends within pages.  A last page that is kept beside the others counts too.
    """
    tokens = np.arange(max_tokens + 1, dtype=np.int64)
    held = np.zeros_like(tokens)
    for group in spec.kv_groups:
        pages = -(-tokens // page_tokens)
        if group.window is not None:
            pages = np.minimum(pages, -(-group.window // page_tokens) + 1)
        held += pages * (page_tokens * group.num_layers * group.bytes_per_token)
    return held + np.minimum(tokens, 1) * (page_tokens * spec.tail_bytes_per_token)


def shared_kv_bytes(spec: ModelSpec, page_tokens: int, max_tokens: int) -> Ints:
    """Return the bytes of the pages that sequences with 0, 1, ... max_tokens common tokens hold once.

    Layers with windows do not count, because their windows soon move beyond the common tokens.
    """
    pages = np.arange(max_tokens + 1, dtype=np.int64) // page_tokens
    page_bytes = sum(page_tokens * group.num_layers * group.bytes_per_token for group in spec.kv_groups if group.window is None)
    return pages * page_bytes


def kv_room(spec: ModelSpec, policy: Policy) -> dict[str, int]:
    """Return the bytes of KV that the pool of each tier holds, not counting what pads pages on disk."""
    return {"device": policy.kv_device_bytes, "host": policy.kv_host_bytes, "disk": int(policy.kv_disk_bytes / spec.disk_kv_growth)}


def visible_pairs(prompt_len: Any, window: int | float) -> Any:
    """Return the number of (query, visible token) pairs of whole prompts."""
    beyond = np.maximum(prompt_len - window, 0)
    return (prompt_len * (prompt_len + 1) - beyond * (beyond + 1)) // 2


def attended_tokens(prompt_len: Any, output_len: Any, window: float) -> Any:
    """Return how many tokens all next tokens of an answer see: the k-th (k from 1 to output_len - 1) sees min(prompt_len + k, window)."""
    ramp = np.clip(window - prompt_len, 0, output_len - 1)
    return prompt_len * ramp + ramp * (ramp + 1) / 2 + window * (output_len - 1 - ramp)


def earlier_tokens(found_len: Any, own_len: Any, window: Any, chunk_tokens: Any) -> Any:
    """Return how many tokens that are stored before them the chunks of prompts see.

    A last chunk of a single token does not count, because it is computed as a next token is.

    Args:
        found_len: The tokens before the prompts' own, which others have computed.
        own_len: The tokens that are computed.
        window: The number of visible tokens.
        chunk_tokens: The tokens of a chunk.
    """
    number = np.where(chunk_tokens > 1, own_len // chunk_tokens + (own_len % chunk_tokens > 1), 0)
    within = np.clip(-((found_len - window + 1) // chunk_tokens), 0, number)  # the chunks that see all tokens before them
    return within * found_len + chunk_tokens * (within * (within - 1) // 2) + (number - within) * (window - 1)


def is_next_token(prompt_len: Any, found_len: Any) -> Any:
    """Return whether a prompt is computed as next tokens are, because only one of its tokens has not been computed by others."""
    return (found_len > 0) & (prompt_len - found_len == 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestLoad:
    """The load that requests add to passes over their whole lives.

    Each number is an array over requests, or the mean of a live sequence in a pass.

    Attributes:
        prompt_tokens: The prompt tokens that are computed.
        num_prompts: The number of prompts.
        next_tokens: The number of tokens that are computed after the prompt, or alone after a prefix that others computed.
        prompt_pairs: The visible pairs of the prompts, per KV group.
        attended_tokens: The visible tokens of the next tokens, per KV group.
        earlier_tokens: The visible tokens before prompts and before later chunks of them, per KV group, by home of the KV: beside a device
            prompts whose KV goes to disk have no chunks. Empty where that is not wanted.
        num_sampled: The number of tokens that are generated.
        num_scored: The number of positions at which known tokens are scored.
    """

    prompt_tokens: Any
    num_prompts: Any
    next_tokens: Any
    prompt_pairs: tuple[Any, ...]
    attended_tokens: tuple[Any, ...]
    earlier_tokens: Mapping[str, tuple[Any, ...]]
    num_sampled: Any
    num_scored: Any

    @staticmethod
    def of(spec: ModelSpec, workload: Workload, micro_batch_tokens: int | None = None) -> RequestLoad:
        """Return the load of each request of a job.

        Args:
            spec: The model.
            workload: The job.
            micro_batch_tokens: The tokens of a chunk of a prompt beside a device; None to leave `earlier_tokens` empty.
        """
        prompts, found = np.array(workload.prompt_lens, dtype=np.float64), np.array(workload.found_lens, dtype=np.float64)
        outputs = np.array(workload.answer_lens, dtype=np.float64)
        windows = [float(group.window or (prompts + outputs).max()) for group in spec.kv_groups]
        alone = is_next_token(prompts, found).astype(np.float64)
        pairs = [visible_pairs(prompts, window) - visible_pairs(found, window) for window in windows]
        attended = [attended_tokens(prompts, outputs, window) for window in windows]
        chunks: dict[str, Any] = {} if micro_batch_tokens is None else {"host": float(micro_batch_tokens), "disk": prompts - found}
        return RequestLoad(
            prompt_tokens=(prompts - found) * (1 - alone),
            num_prompts=1 - alone,
            next_tokens=outputs - 1 + alone,
            prompt_pairs=tuple(each * (1 - alone) for each in pairs),
            attended_tokens=tuple(each + alone * np.minimum(prompts, window) for each, window in zip(attended, windows, strict=True)),
            earlier_tokens={
                home: tuple(earlier_tokens(found, prompts - found, window, chunk) for window in windows) for home, chunk in chunks.items()
            },
            num_sampled=np.array(workload.sampled_lens, dtype=np.float64),
            num_scored=np.array(workload.scored_lens or (0,) * len(workload), dtype=np.float64),
        )

    def mean(self) -> RequestLoad:
        """Return what one live sequence adds to a pass of the steady state on average, with all ages of all requests equally frequent."""
        passes = float((self.num_prompts + self.next_tokens).sum())
        entering = float(self.num_prompts.sum()) / passes
        return RequestLoad(
            prompt_tokens=float(self.prompt_tokens.sum()) / passes,
            num_prompts=entering,
            next_tokens=1.0 - entering,
            prompt_pairs=tuple(float(pairs.sum()) / passes for pairs in self.prompt_pairs),
            attended_tokens=tuple(float(tokens.sum()) / passes for tokens in self.attended_tokens),
            earlier_tokens={home: tuple(float(tokens.sum()) / passes for tokens in counts) for home, counts in self.earlier_tokens.items()},
            num_sampled=float(self.num_sampled.sum()) / passes,
            num_scored=float(self.num_scored.sum()) / passes,
        )

    def at(self, home: str, times: float = 1) -> PassLoad:
        """Return `times` this load, with the KV at `home`."""
        return PassLoad(
            prompt_tokens={home: self.prompt_tokens * times},
            num_prompts={home: self.num_prompts * times},
            next_tokens={home: self.next_tokens * times},
            prompt_pairs=[pairs * times for pairs in self.prompt_pairs],
            attended_tokens={home: [tokens * times for tokens in self.attended_tokens]},
            earlier_tokens={home: [tokens * times for tokens in self.earlier_tokens[home]]} if home in self.earlier_tokens else {},
            num_sampled=self.num_sampled * times,
            num_scored=self.num_scored * times,
        )


class JobSizes:
    """The needs of a job's requests: KV bytes, and the prompt tokens that keep a block full.

    Attributes:
        largest: The KV bytes of the largest request at its longest, including those that windowed layers hold during its prompt.
        smallest: The KV bytes of the smallest request, counted in the same way.
        all: The KV bytes of all requests at their longest, with shared ones counted once.
        mean: The KV bytes of a live sequence on average.
        layer: The KV bytes of one layer of the longest sequence, in the dtype of computing or on disk, whichever is more.
        prompt_tokens: The prompt tokens that the job computes.
        shortest_prompt: The fewest prompt tokens that a request computes.
        longest_prompt: The tokens of the longest prompt.
        longest: The tokens of the longest prompt and answer.
        has_answers: Whether any request generates something.
        scored_tokens: The positions at which the job scores known tokens.
        most_scored: The most such positions of a request.
        num_likeliest: The most likeliest tokens that are returned at such a position.
    """

    def __init__(self, spec: ModelSpec, workload: Workload, page_tokens: int) -> None:
        prompts, most, answers = workload.prompt_lens, [max(n, 1) for n in workload.output_lens], workload.answer_lens
        longest = [s + n for s, n in zip(prompts, most, strict=True)]
        held = held_kv_bytes(spec, page_tokens, max(longest))
        peaks = [int(held[length - 1]) for length in longest]
        before = np.concatenate([[0], np.cumsum(held)])
        self._spec, self._number, self._passes = spec, len(prompts), sum(answers)
        found = list(workload.found_lens)
        shared = [int(each) for each in shared_kv_bytes(spec, page_tokens, max(found))[found]]
        self.prompt_tokens = sum(prompts) - sum(found)
        self.longest_prompt, self.longest = max(prompts), max(longest)
        self.shortest_prompt = min(s - c for s, c in zip(prompts, found, strict=True))
        whole = sum(
            (align_up(self.longest, page_tokens) + page_tokens) * group.num_layers * group.bytes_per_token
            for group in spec.kv_groups
            if group.window is not None
        )
        self.largest, self.smallest, self.all = max(peaks) + whole, min(peaks) + whole, sum(peaks) - sum(shared)
        held_by_all = sum(int(before[s + n] - before[s]) - n * once for s, n, once in zip(prompts, answers, shared, strict=True))
        self.mean = max(held_by_all / self._passes, 1.0)
        self.has_answers = any(workload.output_lens)
        self.scored_tokens, self.most_scored = workload.scored_tokens, max(workload.scored_lens, default=0)
        self.num_likeliest = spec.vocab_size if workload.num_likeliest == -1 else min(workload.num_likeliest, spec.vocab_size)
        self.layer = self.longest * max(
            (max(group.disk_bytes_per_token, group.exact_bytes_per_token) for group in spec.kv_groups), default=0
        )

    def block(self, pool_bytes: float) -> float:
        """Return the approximate number of sequences that pools keep alive."""
        return min(pool_bytes / self.mean, self._number)

    def num_seqs(self, policy: Policy) -> float:
        """Return the approximate number of sequences that a policy keeps alive."""
        return min(policy.max_num_seqs, self.block(sum(kv_room(self._spec, policy).values())))

    def quota(self, pool_bytes: float, share: float) -> int:
        """Return the prompt tokens per pass: half of those that replace ending sequences at `share` 0, the whole block at 1."""
        prompts = max(self.block(pool_bytes), 1.0) * self.prompt_tokens / self._number
        slowest = self._number / self._passes / 2
        return math.ceil(prompts * slowest ** (1 - share))

    def quota_share(self, times: float) -> float:
        """Return the share whose quota is `times` the prompt tokens that replace the sequences that end."""
        return min(math.log(2 * times) / math.log(2 * self._passes / self._number), 1.0)

"""Accounts for the memory that copies between the host and a device land in and start from, beside those of weights."""

from __future__ import annotations

import dataclasses

from flexgen.base.quantities import align_up
from flexgen.options import DTYPE_BYTES
from flexgen.plan.machine import has_device_tier
from flexgen.plan.model import ModelSpec
from flexgen.plan.policy import PROMPTS_ON_THE_WAY, Policy
from flexgen.plan.price.memory import FRAGMENTATION, tokens_at_once
from flexgen.plan.price.requests import JobSizes

PAGE_BYTES, ID_BYTES = 4096, 8
SCORE_BYTES, LIKELIEST_BYTES = 8, 16  # of a scored position, and of each of the likeliest tokens beside it
INDEX_TENSORS = 4  # with a number for each token, and for each sequence and layer group, such as where a token is stored


def with_copies(policy: Policy, spec: ModelSpec, sizes: JobSizes) -> Policy:
    """Return the policy with memory for the copies of its passes."""
    if not has_device_tier(policy.device):
        return policy
    into, out = copies_bytes(spec, sizes, policy)
    return dataclasses.replace(policy, copies_in_bytes=into, copies_out_bytes=out)


def copies_bytes(spec: ModelSpec, sizes: JobSizes, policy: Policy, max_num_seqs: int | None = None) -> tuple[int, int]:
    """Return the bytes that are on their way to the device, and from it, in the worst case; none on a CPU.

    These are embedding rows and index tensors of a micro-batch; where KV is not on the device, what all next tokens give to and take from
    attention on the host, keys and values of some micro-batches of prompts, and as often those of the longest sequence, for a prompt that
    goes on with it; and the scores of a pass.

    Args:
        spec: The model.
        sizes: The sizes of the job's requests.
        policy: The policy.
        max_num_seqs: The number of sequences to assume in place of the policy's.
    """
    if not has_device_tier(policy.device):
        return 0, 0
    size, most = DTYPE_BYTES[policy.dtype], max_num_seqs or policy.max_num_seqs
    _, running = tokens_at_once(sizes, policy, most)
    groups = len(spec.kv_groups)
    tables = most * groups * (sizes.longest // policy.page_tokens + INDEX_TENSORS)
    into = (tables + running * INDEX_TENSORS * (1 + groups)) * ID_BYTES
    if not policy.embedding_resident:
        into += running * (spec.hidden_size * size + spec.embedding_row_bytes + ID_BYTES)
    out = min(sizes.scored_tokens, most * sizes.most_scored) * (SCORE_BYTES + LIKELIEST_BYTES * sizes.num_likeliest)
    if policy.kv.device < 1:
        # Two FLOPs for each number of a head's key and value.  Its query and result are as large, or less than twice that on latents.
        steps = most * int(max((group.attention_flops_per_pair for group in spec.kv_groups), default=0)) * size
        into += steps + PROMPTS_ON_THE_WAY * sizes.layer
        out += steps + (most + PROMPTS_ON_THE_WAY * running) * sizes.layer // sizes.longest
    return _rounded(into), _rounded(out)


def _rounded(size_bytes: int) -> int:
    return align_up(int(FRAGMENTATION * size_bytes), PAGE_BYTES)

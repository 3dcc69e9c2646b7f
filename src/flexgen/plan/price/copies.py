"""Accounts for the memory that copies between the host and a device, or between stages, land in and start from, beside those of weights."""

from __future__ import annotations

import dataclasses

from flexgen.base.quantities import align_up
from flexgen.options import DTYPE_BYTES
from flexgen.plan.machine import has_device_tier
from flexgen.plan.model import ModelSpec
from flexgen.plan.policy import KV_BATCH_BYTES, KV_RING_BATCHES, PROMPTS_ON_THE_WAY, STEPS_ON_THE_WAY, Policy
from flexgen.plan.price.memory import FRAGMENTATION, tokens_at_once
from flexgen.plan.price.requests import JobSizes

PAGE_BYTES, ID_BYTES = 4096, 8
SCORE_BYTES, LIKELIEST_BYTES = 8, 16  # of a scored position, and of each of the likeliest tokens beside it
# The ring for pages of KV takes at most this share of the device, unless a single sequence needs more; and what pads a layer's parts.
KV_RING_SHARE, RING_PADDING_BYTES = 0.05, 4096
INDEX_TENSORS = 4  # with a number for each token, and for each sequence and layer group, such as where a token is stored


def with_copies(policy: Policy, spec: ModelSpec, sizes: JobSizes) -> Policy:
    """Return the policy with memory for the copies of its passes, and for the hidden states that pass between stages."""
    if not has_device_tier(policy.device) and policy.num_blocks == 1:
        return policy
    into, out = copies_bytes(spec, sizes, policy)
    return dataclasses.replace(policy, copies_in_bytes=into, copies_out_bytes=out, hidden_bytes=hidden_bytes(spec, sizes, policy))


def hidden_bytes(spec: ModelSpec, sizes: JobSizes, policy: Policy) -> int:
    """Return the host memory for the hidden states of two passes, of which one arrives while the other leaves; none with one block."""
    if policy.num_blocks == 1:
        return 0
    tokens, _ = tokens_at_once(sizes, policy, policy.max_num_seqs)
    return align_up(2 * tokens * spec.hidden_size * DTYPE_BYTES[policy.dtype], PAGE_BYTES)


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
        stored = most if policy.host_attention else max(STEPS_ON_THE_WAY * min(running, most), most)
        out += steps + (stored + PROMPTS_ON_THE_WAY * running) * sizes.layer // sizes.longest
    return _rounded(into), _rounded(out)


def with_ring(policy: Policy, spec: ModelSpec, sizes: JobSizes, device_bytes: int) -> Policy:
    """Return the policy with a ring for pages that next tokens see in host memory, if they are attended to on the device.

    It holds a layer of some micro-batches, each of as many sequences as it may have, but no more bytes than KV_BATCH_BYTES and than the
    ring's share of the device allow; of one sequence always.
    """
    if policy.host_attention or not has_device_tier(policy.device) or policy.kv.device >= 1:
        return dataclasses.replace(policy, kv_ring_bytes=0)
    longest = longest_layer_bytes(spec, sizes, policy.page_tokens)
    number = min(policy.micro_batch_tokens, policy.max_num_seqs)
    most = min(KV_BATCH_BYTES, int(KV_RING_SHARE * device_bytes) // KV_RING_BATCHES)
    ring_bytes = align_up(KV_RING_BATCHES * max(longest, min(number * longest, most)) + RING_PADDING_BYTES, PAGE_BYTES)
    return dataclasses.replace(policy, kv_ring_bytes=ring_bytes)


def longest_layer_bytes(spec: ModelSpec, sizes: JobSizes, page_tokens: int) -> int:
    """Return the bytes of the pages that the last token of the longest sequence sees in a layer, at most."""
    longest = 0
    for group in spec.kv_groups:
        pages = -(-min(sizes.longest, group.window or sizes.longest) // page_tokens) + 1  # windows begin and end within pages
        longest = max(longest, page_tokens * (pages * group.bytes_per_token + group.exact_bytes_per_token))
    return longest


def _rounded(size_bytes: int) -> int:
    return align_up(int(FRAGMENTATION * size_bytes), PAGE_BYTES)

"""Policy: the decisions of a plan as data. The planner makes it, the engine executes it, and the report of a run has it as JSON."""

from __future__ import annotations

import math
from dataclasses import dataclass

from flexgen.base.quantities import MIB

PAGE_TOKENS = 16  # tokens of a KV page in every plan
SCORED_SLICE_BYTES = 32 * MIB  # logits of scored positions that are held at a time
SAMPLED_BLOCK_BYTES = 16 * MIB  # logits in float64 from which tokens are chosen at a time on a device
INT8_SUMS_BYTES = 8 * MIB  # sums of products in int8 that are held at a time
SPARSE_SCORES_BYTES = 4 * MIB  # scores that are sorted at a time where generated tokens are computed again under sparse attention
SPARSE_KV_BYTES = 16 * MIB  # keys and values that are held in float32 at a time where kernels in plain torch attend sparsely
# Temporary tensors of attention on a device that are held at a time, where the sequences of a pass need as many; and how many copies of the
# keys and values of a layer, in the dtype of computing, they amount to at most: codes of few bits become float32 numbers.
ATTENTION_BYTES, ATTENTION_COPIES = 64 * MIB, 10
EXPERTS_BYTES = 256 * MIB  # temporary tensors of the products of experts on a device that are held at a time
LEAST_KEPT = 64  # positions that a head keeps at least under sparse attention: four pages
HOME_ALIGNMENT = 4096  # units in host memory beside a device take whole pages, from which the link copies them
# Units that are decoded at a time: on a CPU as many may be open, and a device decodes one again whose place another has taken.
SCRATCH_UNITS, DEVICE_SCRATCH_UNITS = 3, 2
PROMPTS_ON_THE_WAY = 2  # micro-batches of prompts whose keys and values of a layer are between the device and the host
# Where next tokens attend on the device to KV in host memory: the micro-batches whose new keys and values of a layer may be on their way
# to it; how many micro-batches' pages of a layer the ring holds (one is attended to, one is on its way, the rest is for the end of the
# ring); and the bytes that one has at most, unless it is a single sequence: as a large unit of weights, they cross in 5 to 8 ms.
STEPS_ON_THE_WAY, KV_RING_BATCHES, KV_BATCH_BYTES = 4, 3, 160 * MIB
# A device without kernels for it decodes so many numbers at once by torch operations, whose temporary tensors take at most so many bytes
# for each: indices, values and scales, in float32 or int32.
DECODED_AT_ONCE, DECODING_BYTES = 1 << 21, 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Fractions:
    """Shares per home, which add up to 1.

    Attributes:
        device: The share in the device's memory.
        host: The share in host memory, in the dtype of computing.
        encoded: The share in host memory as stored, which is decoded in every pass; 0 for KV.
        disk: The share on disk.
    """

    device: float = 0.0
    host: float = 0.0
    encoded: float = 0.0
    disk: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """Where every byte lives and what a pass carries.

    Attributes:
        device: "cpu", "cuda" or "sim". On "cpu" there is no device tier, and the model computes in host memory.
        dtype: The dtype of computing, by torch's name ("bfloat16").
        weights: The home fractions of the units' stored bytes. Units that need no decoding, or grow smaller by it, are never kept encoded:
            those in host memory are decoded there.
        kv: The home fractions of KV bytes.
        kv_format: The low-bit format of KV ("int8", "k8v4", "int4"); None for the dtype of computing.
        sparse_attention: The share of positions that a head of a generated token keeps; None for all.
        host_attention: Whether the host attends to the KV in its memory for next tokens; if not, the pages that they see come to the
            device.  On "cpu" there is nothing to choose.
        num_blocks: The number of blocks of sequences in flight, each of which has a pool of its own of every size below.
        kv_device_bytes: The size of the page pool on the device.
        kv_host_bytes: The size of the page pool in host memory.
        kv_disk_bytes: The size of the page pool on disk.
        kv_tail_bytes: Host memory for pages on their way to disk that are not full yet.
        kv_staging_bytes: Host memory for pages read ahead from disk (0 without KV on disk). This and all that follows serves one pass at a
            time, whatever its block.
        kv_ring_bytes: Memory on the device, and as much on the host, for pages on their way to attention on the device (0 if the host
            attends).
        host_ring_bytes: Staging memory for units that come from disk.
        device_ring_bytes: Staging memory on the device for units that are not at home there (0 on "cpu").
        copies_in_bytes: Memory on the device, and as much on the host, for what a pass copies to the device beside weights (0 on "cpu").
        copies_out_bytes: Memory on the host for what a pass copies from the device (0 on "cpu").
        hidden_bytes: Host memory for the hidden states of a pass that come from another stage, and of one that go to another (0 with one
            block).
        workspace_bytes: Memory reserved for activations and temporary tensors.
        embedding_resident: Whether the input embedding stays in memory (rows are gathered from disk otherwise).
        schedule: "diagonal", "zigzag" or "row".
        max_num_seqs: The most sequences that are alive at once.
        prefill_tokens: The prompt quota: the most prompt tokens that a pass admits on average.
        micro_batch_tokens: The most tokens computed together.
        page_tokens: The number of tokens of a KV page.
        compute_threads: The number of threads that compute.
        io_threads: The number of threads that read and write files.
        longest_sequence: The tokens of the job's longest prompt and answer. Each layer group can hold one such sequence whole.
    """

    device: str
    dtype: str
    weights: Fractions
    kv: Fractions
    kv_format: str | None = None
    sparse_attention: float | None = None
    host_attention: bool = True
    num_blocks: int = 1
    kv_device_bytes: int = 0
    kv_host_bytes: int = 0
    kv_disk_bytes: int = 0
    host_ring_bytes: int = 0
    device_ring_bytes: int = 0
    copies_in_bytes: int = 0
    copies_out_bytes: int = 0
    hidden_bytes: int = 0
    workspace_bytes: int = 0
    embedding_resident: bool
    schedule: str
    max_num_seqs: int
    prefill_tokens: int
    micro_batch_tokens: int
    page_tokens: int
    compute_threads: int
    io_threads: int
    kv_staging_bytes: int = 0
    kv_tail_bytes: int = 0
    kv_ring_bytes: int = 0
    longest_sequence: int = 512

    @property
    def kv_bytes(self) -> int:
        """The bytes of all page pools of all blocks."""
        return self.num_blocks * (self.kv_device_bytes + self.kv_host_bytes + self.kv_disk_bytes)


def kept_positions(share: float, num_visible: int) -> int:
    """Return how many positions a head keeps for their scores, of those that it sees, under sparse attention with this share."""
    wanted = math.ceil(share * num_visible - 1e-9)  # 0.1 * 30 is a little more than 3
    return min(num_visible, max(wanted, LEAST_KEPT))

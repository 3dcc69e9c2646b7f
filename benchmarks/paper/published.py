"""What was published: two variants of the cost model, a machine, three models, policies and what they reached.

Sections are the paper's; lines are those of experimental/cost_model.py in the code released with it.
"""

from __future__ import annotations

import dataclasses

from flexgen.base.quantities import GIB

from .case import PaperMachine, PaperModel, PaperPolicy, PaperVariant, PaperWorkload
from .memory import released_scratch, text_scratch

TERA = 1e12

# Section 4.3 and appendix A.3: perfect overlap.  The search's sizes: a GPU batch "is typically a multiple of 4", and there
# are fewer than 20 GPU batches in a block; 1 and 2 are added because the published policies for OPT-6.7B have them.
TEXT = PaperVariant(
    name="text",
    prefill_overlap=(("host_to_device",), ("device_to_host",), ("disk_read",), ("disk_write",), ("compute",)),
    decode_overlap=(("host_to_device",), ("device_to_host",), ("disk_read",), ("disk_write",), ("compute",)),
    capacity_share=1.0,
    activations_on_disk=True,
    host_holds_answers_in_prefill=True,
    scratch=text_scratch,
    small_gpu_batches=(1, 2),
    gpu_batch_step=4,
    most_gpu_batches=20,
    stops_at_first_drop=False,
)

# Lines 43-45 (share of capacities), 180 (no hidden states on disk), 191-194 and
# 222-226 (overlap), 439-529 (search).  The upload of weights in decode overlaps with nothing.
RELEASED = PaperVariant(
    name="released",
    prefill_overlap=(("host_to_device", "disk_read"), ("device_to_host", "disk_write"), ("compute",)),
    decode_overlap=tuple(("host_to_device", term) for term in ("device_to_host", "disk_read", "disk_write", "compute")),
    capacity_share=0.8,
    activations_on_disk=False,
    host_holds_answers_in_prefill=False,
    scratch=released_scratch,
    small_gpu_batches=(1, 2, 3),
    gpu_batch_step=0,
    most_gpu_batches=None,
    stops_at_first_drop=True,
)

VARIANTS = {variant.name: variant for variant in (TEXT, RELEASED)}

# The paper's machine on Google Cloud: a T4, 208 GB, 1.5 TB of NVMe.  Rates are the released code's defaults (lines 62-81), which
# were fitted to logged runs; capacities are those of its usage example (16, 200, 1500), which are binary.
T4_FITTED = PaperMachine(
    name="GCP T4, fitted rates",
    device_bytes=16 * GIB,
    host_bytes=200 * GIB,
    disk_bytes=1500 * GIB,
    host_to_device_bytes_per_s=12.89 * GIB,
    kv_to_host_bytes_per_s=0.97 * GIB,
    activations_to_host_bytes_per_s=4.82 * GIB,
    disk_read_bytes_per_s=0.473 * GIB,
    decode_weights_read_bytes_per_s=0.95 * 0.473 * GIB,
    kv_to_disk_bytes_per_s=0.746 * GIB,
    activations_to_disk_bytes_per_s=2.015 * GIB,
    decode_write_bytes_per_s=2.015 * GIB,
    prefill_flops=21.24 * TERA,
    decode_flops=4.3 * TERA,
    prefill_attention_flops=9.97 * TERA,
    decode_attention_flops=0.079 * TERA,
    host_attention_flops=0.0123 * TERA,
    host_slowdown=(0.0168, 0.0328, 0.0621),
)

# The links as the paper prints them: 12 GB/s between CPU and GPU, and a disk that reads about 2 GB/s and writes about 1 GB/s.
# It prints no FLOPs, so those stay fitted.
T4_PRINTED = dataclasses.replace(
    T4_FITTED,
    name="GCP T4, printed rates",
    host_to_device_bytes_per_s=12e9,
    kv_to_host_bytes_per_s=12e9,
    activations_to_host_bytes_per_s=12e9,
    disk_read_bytes_per_s=2e9,
    decode_weights_read_bytes_per_s=2e9,
    kv_to_disk_bytes_per_s=1e9,
    activations_to_disk_bytes_per_s=1e9,
    decode_write_bytes_per_s=1e9,
)

# Zhang et al. 2022 (OPT), table 1: layers, heads, hidden size; the MLP is four times as wide.
OPT = {
    name: PaperModel(name=name, num_hidden_layers=layers, hidden_size=hidden, intermediate_size=4 * hidden, num_attention_heads=heads)
    for name, layers, heads, hidden in (
        ("opt-6.7b", 32, 32, 4096),
        ("opt-30b", 48, 56, 7168),
        ("opt-175b", 96, 96, 12288),
    )
}

# The workload of table 2, the policies that reached its figures, and the figures in generated tokens per second; table 3 has
# those of decode alone: bls (n - 1) tokens over its seconds.
WORKLOAD = PaperWorkload(prompt_len=512, output_len=32)
POLICIES = {
    "opt-6.7b": PaperPolicy.published(2, 1, (100, 0, 100, 0, 100, 0)),
    "opt-30b": PaperPolicy.published(48, 3, (20, 80, 0, 100, 0, 100)),
    "opt-175b": PaperPolicy.published(32, 8, (0, 50, 0, 0, 0, 100)),
}
MEASURED_TOKENS_PER_S = {"opt-6.7b": 25.26, "opt-30b": 7.32, "opt-175b": 0.69}
MEASURED_DECODE_TOKENS_PER_S = {"opt-6.7b": 38.28, "opt-30b": 11.52, "opt-175b": 0.83}

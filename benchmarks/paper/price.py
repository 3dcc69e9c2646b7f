"""The paper's price of a block: seconds of a layer, term by term, and tokens per second.  Affine in the nine fractions."""

from __future__ import annotations

from collections.abc import Mapping

from flexgen.errors import OptionError
from flexgen.plan.policy import Fractions

from .case import BYTES_PER_NUMBER, PaperCase, PaperPolicy


def _off_device(shares: Fractions) -> float:
    return shares.host + shares.disk


def prefill_seconds(case: PaperCase, policy: PaperPolicy) -> dict[str, float]:
    """Term -> seconds of one layer in the prefill of a block."""
    machine, model, prompt = case.machine, case.model, case.workload.prompt_len
    sequences, weights, kv, activations = policy.num_sequences, policy.weights, policy.kv, policy.activations
    hidden_bytes = sequences * prompt * BYTES_PER_NUMBER * model.hidden_size
    kv_bytes = sequences * (prompt + 1) * model.kv_bytes_per_token
    attention_flops = 4 * sequences * prompt**2 * model.hidden_size
    return {
        "host_to_device": (_off_device(weights) * model.layer_bytes + _off_device(activations) * hidden_bytes)
        / machine.host_to_device_bytes_per_s,
        "device_to_host": _off_device(kv) * kv_bytes / machine.kv_to_host_bytes_per_s
        + _off_device(activations) * hidden_bytes / machine.activations_to_host_bytes_per_s,
        "disk_read": (weights.disk * model.layer_bytes + activations.disk * hidden_bytes) / machine.disk_read_bytes_per_s,
        "disk_write": kv.disk * kv_bytes / machine.kv_to_disk_bytes_per_s
        + activations.disk * hidden_bytes / machine.activations_to_disk_bytes_per_s,
        "compute": sequences * prompt * model.layer_flops_per_token / machine.prefill_flops
        + attention_flops / machine.prefill_attention_flops,
    }


def decode_seconds(case: PaperCase, policy: PaperPolicy) -> dict[str, float]:
    """Term -> seconds of one layer in an average decode step of a block.

    KV on the host never crosses the link, since attention runs there; the host's seconds add to the device's.
    """
    machine, model = case.machine, case.model
    sequences, weights, kv, activations = policy.num_sequences, policy.weights, policy.kv, policy.activations
    attended = case.workload.prompt_len + case.workload.output_len / 2
    hidden_bytes = sequences * BYTES_PER_NUMBER * model.hidden_size
    kv_bytes = sequences * model.kv_bytes_per_token
    attention_flops = 4 * sequences * attended * model.hidden_size
    return {
        "host_to_device": (_off_device(weights) * model.layer_bytes + _off_device(activations) * hidden_bytes)
        / machine.host_to_device_bytes_per_s,
        "device_to_host": _off_device(activations) * hidden_bytes / machine.activations_to_host_bytes_per_s,
        "disk_read": (kv.disk * kv_bytes * attended + activations.disk * hidden_bytes) / machine.disk_read_bytes_per_s
        + weights.disk * model.layer_bytes / machine.decode_weights_read_bytes_per_s,
        "disk_write": (kv.disk * kv_bytes + activations.disk * hidden_bytes) / machine.decode_write_bytes_per_s,
        "compute": sequences * model.layer_flops_per_token / machine.decode_flops
        + kv.device * attention_flops / machine.decode_attention_flops
        + _off_device(kv) * attention_flops / machine.host_flops(policy.gpu_batch_size, model.hidden_size),
    }


def overlapped(terms: Mapping[str, float], overlap: tuple[tuple[str, ...], ...]) -> tuple[float, ...]:
    """Seconds of each group of terms, the longest of which a layer takes."""
    return tuple(sum(terms[name] for name in group) for group in overlap)


def layer_seconds(case: PaperCase, policy: PaperPolicy) -> tuple[float, float]:
    """Tpre and Tgen: seconds of one layer in the prefill and in an average decode step."""
    prefill = overlapped(prefill_seconds(case, policy), case.variant.prefill_overlap)
    decode = overlapped(decode_seconds(case, policy), case.variant.decode_overlap)
    return max(prefill), max(decode)


def block_seconds(case: PaperCase, policy: PaperPolicy) -> float:
    """T = Tpre l + Tgen (n - 1) l."""
    prefill, decode = layer_seconds(case, policy)
    return (prefill + decode * (case.workload.output_len - 1)) * case.model.num_hidden_layers


def throughput(case: PaperCase, policy: PaperPolicy) -> float:
    """Generated tokens per second, prefill included.  Whether the policy fits is another question: see `peak_bytes`.

    Raises:
        OptionError: fractions that do not add up to 1.
    """
    for name, shares in (("weights", policy.weights), ("kv", policy.kv), ("activations", policy.activations)):
        total = shares.device + shares.host + shares.disk
        if abs(total - 1) > 1e-6:
            raise OptionError(f"paper policy: the fractions of {name} add up to {total:g}, not to 1")
    return policy.num_sequences * case.workload.output_len / block_seconds(case, policy)

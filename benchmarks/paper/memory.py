"""The paper's memory constraints: bytes in use per tier, affine in the nine fractions."""

from __future__ import annotations

from .case import BYTES_PER_NUMBER, PaperCase, PaperModel, PaperPolicy, PaperWorkload


def held_bytes(case: PaperCase, policy: PaperPolicy) -> dict[str, tuple[float, ...]]:
    """Tier -> bytes in use at the moments that matter, each of which must fit: stages of the prefill and of decode."""
    prompt_stages, decode_stages = case.variant.scratch(case.model, case.workload, policy)
    prompt, whole = case.workload.prompt_len, case.workload.prompt_len + case.workload.output_len
    host_prompt = whole if case.variant.host_holds_answers_in_prefill else prompt
    return {
        "device": (
            *(_home(case, policy, "device", prompt, whole) + _fetched(case, policy, prompt) + stage for stage in prompt_stages),
            *(_home(case, policy, "device", 1, whole) + _fetched(case, policy, 1) + stage for stage in decode_stages),
        ),
        "host": (
            _home(case, policy, "host", prompt, host_prompt) + _staged_in_prefill(case, policy),
            _home(case, policy, "host", 1, whole) + _staged_in_decode(case, policy),
        ),
        "disk": (_home(case, policy, "disk", prompt, whole),),
    }


def peak_bytes(case: PaperCase, policy: PaperPolicy) -> dict[str, float]:
    """Tier -> most bytes in use."""
    return {tier: max(moments) for tier, moments in held_bytes(case, policy).items()}


def _home(case: PaperCase, policy: PaperPolicy, tier: str, hidden_tokens: int, kv_tokens: int) -> float:
    """Bytes that live on `tier`: weights and KV of all layers, hidden states of one."""
    model, sequences = case.model, policy.num_sequences
    weights, kv, activations = (getattr(each, tier) for each in (policy.weights, policy.kv, policy.activations))
    held = weights * model.layer_bytes + kv * sequences * kv_tokens * model.kv_bytes_per_token
    return held * model.num_hidden_layers + activations * sequences * hidden_tokens * BYTES_PER_NUMBER * model.hidden_size


def _fetched(case: PaperCase, policy: PaperPolicy, hidden_tokens: int) -> float:
    """Device bytes for what arrives: two layers' weights, one computing and one on its way, and a batch's hidden states."""
    hidden_bytes = policy.gpu_batch_size * hidden_tokens * BYTES_PER_NUMBER * case.model.hidden_size
    return 2 * (1 - policy.weights.device) * case.model.layer_bytes + (1 - policy.activations.device) * hidden_bytes


def _staged_in_prefill(case: PaperCase, policy: PaperPolicy) -> float:
    hidden_bytes = policy.gpu_batch_size * case.workload.prompt_len * BYTES_PER_NUMBER * case.model.hidden_size
    return (1 - policy.weights.device) * case.model.layer_bytes + (1 - policy.activations.device) * hidden_bytes


def _staged_in_decode(case: PaperCase, policy: PaperPolicy) -> float:
    """Host bytes for what the disk sends, KV twice, and for the scores and the result of attention."""
    model, whole = case.model, case.workload.prompt_len + case.workload.output_len
    kv_bytes = 2 * whole * model.kv_bytes_per_token * policy.kv.disk
    hidden_bytes = 2 * BYTES_PER_NUMBER * model.hidden_size * policy.activations.disk
    attention_bytes = BYTES_PER_NUMBER * (model.num_attention_heads * whole + model.hidden_size)
    return policy.weights.disk * model.layer_bytes + policy.gpu_batch_size * (hidden_bytes + kv_bytes + attention_bytes)


def text_scratch(model: PaperModel, workload: PaperWorkload, policy: PaperPolicy) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Temporary device bytes by appendix A.3: projections, scores, embedding and MLP, of which one exists at a time.

    The scores of the prompt are multiplied by the device's share of KV, as printed, although attention to a prompt
    always runs on the device.
    """
    hidden, intermediate, heads, prompt = model.hidden_size, model.intermediate_size, model.num_attention_heads, workload.prompt_len
    whole = prompt + workload.output_len
    batch, on_device = policy.gpu_batch_size * BYTES_PER_NUMBER, policy.kv.device
    prefill = (
        batch * 4 * prompt * hidden,
        batch * (2 * prompt * hidden + heads * prompt**2) * on_device,
        batch * 2 * prompt * hidden,
        batch * prompt * (hidden + intermediate),
    )
    decode = (
        batch * 4 * hidden,
        batch * (hidden + whole * hidden + heads * whole) * on_device,
        batch * 2 * hidden,
        batch * (hidden + intermediate),
    )
    return prefill, decode


def released_scratch(model: PaperModel, workload: PaperWorkload, policy: PaperPolicy) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Temporary device bytes by the released code (lines 285-320): the sum of what all stages put out, whole scores included."""
    hidden, intermediate, heads, prompt = model.hidden_size, model.intermediate_size, model.num_attention_heads, workload.prompt_len
    whole = prompt + workload.output_len
    batch, on_device = policy.gpu_batch_size * BYTES_PER_NUMBER, policy.kv.device
    prefill = batch * (prompt * (9 * hidden + intermediate) + heads * prompt**2)
    # Keys and values count twice: as they are fetched, and as attention reads them.
    attention = batch * (2 * hidden + 4 * whole * hidden + heads * whole) * on_device
    return (prefill,), (batch * (7 * hidden + intermediate) + attention,)

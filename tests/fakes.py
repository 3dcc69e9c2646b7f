"""Stand-ins that several tests share: a model folder without a usable model, and an engine that only pretends.

conftest.py makes the fixtures known to all tests.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from machines import machine_of

from flexgen.errors import RequestError
from flexgen.plan.model import KVGroupSpec, ModelSpec, UnitSpec
from flexgen.plan.policy import Fractions, Policy
from flexgen.plan.tell.forecast import Forecast, Plan
from flexgen.plan.workload import Workload
from flexgen.report.progress import Progress, RunReport
from flexgen.request import PartialAnswer, TokenLogprobs, TokenRequest, TokenResult
from flexgen.text.common_prefixes import NO_PREFIXES, CommonPrefixes

EOS = 256
VOCAB = 300  # 256 bytes, </s> = 256, <pad> = 257, and some ids that the tokenizer does not know
CONTEXT = 64
LETTER_A = 64  # the tokenizer's id of "a"
POISON = 299  # a prompt with this id fails in the fake engine


def fake_token(request: TokenRequest, place: int) -> int:
    """What the fake engine answers: letters that depend on the prompt, the seed (unless greedy) and the place only."""
    salt = request.seed if request.temperature > 0 else 0
    return LETTER_A + (sum(request.prompt_token_ids) + salt + 7 * place * place) % 26


def fake_text(prompt: str, num_tokens: int, *, seed: int = 0, greedy: bool = True) -> str:
    """The text that the fake engine answers to an ASCII prompt."""
    ids = tuple(byte_id(character) for character in prompt)
    request = TokenRequest(index=0, prompt_token_ids=ids, max_tokens=num_tokens, temperature=0.0 if greedy else 1.0, seed=seed)
    return "".join(chr(ord("a") + fake_token(request, place) - LETTER_A) for place in range(num_tokens))


def fake_logprob(previous: int, token_id: int) -> float:
    """The log probability that the fake engine gives to a token of a prompt after another; no two tokens have the same after one."""
    return -(1 + (31 * previous + 17 * token_id) % 307) / 8


def fake_scores(request: TokenRequest) -> tuple[TokenLogprobs, ...] | None:
    """The scores of a request's prompt in the fake engine."""
    if request.num_prompt_logprobs is None:
        return None
    prompt, count = request.prompt_token_ids, request.num_prompt_logprobs
    pairs = [*zip(prompt[request.first_scored - 1 :], prompt[request.first_scored :], strict=False)]
    return tuple(_fake_entry(count, *pair) for pair in [*pairs, *((prompt[-1], each) for each in request.alternatives)])


def fake_logprobs(request: TokenRequest, token_ids: Sequence[int]) -> tuple[TokenLogprobs, ...] | None:
    """The log probabilities of an answer in the fake engine."""
    if request.num_logprobs is None:
        return None
    before = (request.prompt_token_ids[-1], *token_ids)
    return tuple(_fake_entry(request.num_logprobs, *pair) for pair in zip(before, token_ids, strict=False))


def _fake_entry(num_logprobs: int, previous: int, token_id: int) -> TokenLogprobs:
    likeliest = sorted(range(VOCAB), key=lambda each: -fake_logprob(previous, each))
    if num_logprobs != -1:
        del likeliest[num_logprobs:]
    ids = (token_id, *likeliest)
    rank = likeliest.index(token_id) + 1 if token_id in likeliest else None
    return TokenLogprobs(token_ids=ids, logprobs=tuple(fake_logprob(previous, each) for each in ids), rank=rank)


def byte_id(character: str) -> int:
    """The tokenizer's id of a printable ASCII character (a space is 220)."""
    return 220 if character == " " else ord(character) - ord("a") + LETTER_A


FORECAST = Forecast(
    seconds=2.0, num_passes=3, num_requests=2, num_refused=0, prompt_tokens=8, output_tokens=64, output_tokens_per_s=32.0,
    full_block_tokens_per_s=40.0, live_mean=2.0, request_seconds=1.5, pass_seconds=0.7, resource_seconds={"disk": 0.7, "compute": 0.2},
    bottleneck="disk", memory_bytes={"host": {"weights": 1000}}, budget_bytes={"host": 2000}, weights_bytes_per_pass={"disk_read": 750},
    disk_written_bytes=0.0, gain_per_gib={"host": 0.041}, gain_per_rate={"disk": 0.6, "compute": 0.4},
)  # fmt: skip


class FakeEngine:
    """Answers in blocks of `max_num_seqs`, shortest first, pulling requests only when there is room.

    Its plan is for requests of up to `most_tokens`; longer ones have no place.
    """

    def __init__(self, workload: Workload, max_num_seqs: int = 4, kv_host_bytes: int = 1 << 40, most_tokens: int = 1 << 40) -> None:
        self.workload = workload
        self.closed = False
        self.num_pulled = 0
        self.prefixes = NO_PREFIXES
        self.results: list[TokenResult] = []
        self.prompt_tokens = 0
        spec = ModelSpec(
            name="fake",
            model_type="opt",
            units=(UnitSpec(name="layers.0", disk_bytes=1000, decoded_bytes=1000, flops_per_token=2000.0),),
            kv_groups=(KVGroupSpec(num_layers=1, bytes_per_token=10, attention_flops_per_pair=4.0),),
            resident_bytes=10,
            embedding_bytes=100,
            embedding_row_bytes=1,
            hidden_size=8,
            intermediate_size=16,
            vocab_size=VOCAB,
            max_position_embeddings=CONTEXT,
        )
        machine = machine_of(dense={"float32": [(1, 1e11)]}, host_to_device=None, device_to_host=None)
        self.load_seconds = 0.0
        totals = [p + o for p, o in zip(workload.prompt_lens, workload.output_lens, strict=True)]
        policy = Policy(
            device="cpu", dtype="float32", weights=Fractions(host=0.25, disk=0.75), kv=Fractions(host=1.0), kv_device_bytes=0,
            kv_host_bytes=kv_host_bytes, kv_disk_bytes=0, host_ring_bytes=1 << 20, device_ring_bytes=0, workspace_bytes=1 << 20,
            embedding_resident=True, schedule="diagonal", max_num_seqs=max_num_seqs, prefill_tokens=256, micro_batch_tokens=64,
            page_tokens=16, compute_threads=1, io_threads=1, longest_sequence=max((n for n in totals if n <= most_tokens), default=512),
        )  # fmt: skip
        self.plan = Plan(spec=spec, machine=machine, policy=policy, forecast=FORECAST)

    def expect(self, workload: Workload) -> None:
        self.expected = workload

    def generate(
        self,
        requests: Iterable[TokenRequest],
        *,
        num_requests: int | None = None,
        prefixes: CommonPrefixes = NO_PREFIXES,
        on_progress: Callable[[Progress], None] | None = None,
        on_pass: Callable[[Iterable[PartialAnswer]], None] | None = None,
    ) -> Iterator[TokenResult]:
        waiting = iter(requests)
        self.prefixes = prefixes
        self.results = []
        self.prompt_tokens = 0
        while block := [r for _, r in zip(range(self.plan.policy.max_num_seqs), waiting, strict=False)]:
            self.num_pulled += len(block)
            self.prompt_tokens += sum(len(r.prompt_token_ids) for r in block)
            for request in sorted(block, key=lambda r: r.max_tokens):
                result = self._answer(request)
                self.results.append(result)
                yield result
            if on_progress is not None:
                on_progress(self._progress(num_requests))
            if on_pass is not None:
                on_pass(())  # a block is answered as a whole

    def _answer(self, request: TokenRequest) -> TokenResult:
        if POISON in request.prompt_token_ids:
            error = RequestError("the model produced logits that are not finite", code="non_finite_logits")
            return TokenResult(index=request.index, finish_reason="error", error=error)
        ids = list(request.generated.token_ids)
        ending: dict[str, Any] = {"finish_reason": "length"}
        while len(ids) < request.max_tokens:
            ids.append(fake_token(request, len(ids)))
            if ids[-1] in request.stop_token_ids:
                ending = {"finish_reason": "stop"}
                break
            if request.stops is not None and (stop_string := request.stops(ids)) is not None:
                ending = {"finish_reason": "stop", "stop_string": stop_string}
                break
        scores = {"logprobs": fake_logprobs(request, ids), "prompt_logprobs": fake_scores(request)}
        return TokenResult(index=request.index, token_ids=tuple(ids), **scores, **ending)

    def _output_tokens(self) -> int:
        return sum(len(result.token_ids) for result in self.results)

    def _progress(self, num_requests: int | None) -> Progress:
        return Progress(
            elapsed_seconds=1.0, num_requests=num_requests, num_requests_done=len(self.results), num_live_sequences=0,
            prompt_tokens=self.prompt_tokens, output_tokens=self._output_tokens(), prompt_tokens_per_s=100.0, output_tokens_per_s=50.0,
            eta_seconds=61.0, pass_index=1, unit=1, num_units=1, link_shares={"disk_read": 0.9, "compute": 0.5},
        )  # fmt: skip

    def report(self) -> RunReport:
        failed = sum(r.error is not None for r in self.results)
        return RunReport(
            elapsed_seconds=2.0, load_seconds=0.1, num_requests=len(self.results), num_errors=failed,
            prompt_tokens=self.prompt_tokens, output_tokens=self._output_tokens(), output_tokens_per_s=1.0, total_tokens_per_s=2.0,
            requests_per_s=1.0, num_passes=3, overlap=0.9, plan=0.8, efficiency=0.72, ideal_seconds=1.44,
            busiest_seconds={"disk_read": 1.8, "compute": 0.3}, placement={"weights": {"host": 250, "disk": 750}, "kv": {"host": 640}},
            bytes_moved={"disk_read": 2250}, wait_seconds={"disk_read": 0.2}, peak_host_bytes=1 << 30, host_budget_bytes=2 << 30,
            peak_device_bytes=0, device_budget_bytes=0, num_preemptions=0, finish_reasons={"length": len(self.results)},
            policy={"device": "cpu"}, machine={"name": "fake"}, model="fake", versions={"torch": "0"},
        )  # fmt: skip

    def close(self) -> None:
        self.closed = True


def _zero_weights() -> bytes:
    """A safetensors file with the tensors of the tiny OPT of `write_model_folder`."""
    linear = {f"self_attn.{name}_proj": (8, 8) for name in "kvqo"} | {"fc1": (16, 8), "fc2": (8, 16)}
    linear["self_attn.out_proj"] = linear.pop("self_attn.o_proj")
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (VOCAB, 8), "embed_positions.weight": (CONTEXT + 2, 8)}
    for name, shape in linear.items():
        shapes |= {f"layers.0.{name}.weight": shape, f"layers.0.{name}.bias": shape[:1]}
    for name in ("final_layer_norm", "layers.0.self_attn_layer_norm", "layers.0.final_layer_norm"):
        shapes |= {f"{name}.weight": (8,), f"{name}.bias": (8,)}
    entries, offset = {}, 0
    for name, shape in shapes.items():
        size = 4 * math.prod(shape)
        entries[f"model.decoder.{name}"] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    header = json.dumps(entries).encode()
    return len(header).to_bytes(8, "little") + header + bytes(offset)


def write_model_folder(folder: Path, *, tokenizer: bool = True, generation_config: dict[str, object] | None = None) -> Path:
    """What a loader of everything but weights needs: the config of a tiny OPT, and a tokenizer of bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "model_type": "opt", "architectures": ["OPTForCausalLM"], "vocab_size": VOCAB, "max_position_embeddings": CONTEXT,
        "hidden_size": 8, "ffn_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "word_embed_proj_dim": 8,
        "eos_token_id": 256, "bos_token_id": 256, "pad_token_id": 257,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(_zero_weights())
    if generation_config is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation_config))
    if tokenizer:
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        fast = Tokenizer(models.BPE(vocab={character: i for i, character in enumerate(alphabet)}, merges=[]))
        fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        fast.decoder = decoders.ByteLevel()
        fast.add_special_tokens([AddedToken("</s>", special=True), AddedToken("<pad>", special=True)])
        fast.save(str(folder / "tokenizer.json"))
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "pad_token": "<pad>"}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def bare_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without a tokenizer."""
    return write_model_folder(tmp_path_factory.mktemp("models") / "bare", tokenizer=False)


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[FakeEngine]:
    """Every engine that a test opens, in order; all fake."""
    return open_fakes(monkeypatch, FakeEngine)


def open_fakes(monkeypatch: pytest.MonkeyPatch, make: Callable[[Workload], FakeEngine]) -> list[FakeEngine]:
    """Have `make` make every engine that is opened from here on, and return the list that they are added to."""
    opened: list[FakeEngine] = []

    def open_engine(files: object, options: object, workload: Workload) -> FakeEngine:
        opened.append(make(workload))
        return opened[-1]

    monkeypatch.setattr("flexgen.session.session.open_engine", open_engine)
    return opened

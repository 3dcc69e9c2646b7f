"""Sparse attention in whole models: the same request has the same tokens at every home, however it is cut, shared, preempted and resumed.

Everything is computed in float64, where two products are practically never so close that rounding decides which of them is kept.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from flexgen.engine.admission import LengthForecast
from flexgen.engine.engine import Engine
from flexgen.errors import UnsupportedModelError
from flexgen.kernels.codes import SealedPages
from flexgen.kernels.cpu import CpuKernels
from flexgen.kernels.pages import gather_kv, seen_sealed
from flexgen.kv.low_bit import kv_format
from flexgen.models.assemble import AssembledModel, assemble_model
from flexgen.plan import policy as policy_module
from flexgen.plan.policy import Policy
from flexgen.request import Generated, TokenRequest
from flexgen.text.common_prefixes import PrefixCensus
from tests.kernels.test_attention import dense
from tests.kernels.test_sparse import kept_by
from tests.models.parity import Answers, build, save
from tests.models.test_low_bit_kv import POLICIES, WHOLE, answered, asked, assert_same, placed, tokens
from tests.models.tiny_configs import tiny_config

SHARE, LEAST = 0.2, 3
ROUNDOFF = 2.0**-24  # of float32
# Multi-head, grouped, one key head, windows and caps, windows and sinks, layers that share keys.
MODELS = ("opt", "llama", "gpt_bigcode", "gemma2", "gpt_oss", "gemma3n_text")
KV_FORMATS = ("auto", "int4")
KINDS = ("", "exact_")  # of bytes: in pages, and in tails


@pytest.fixture(autouse=True, scope="module")
def _few_positions() -> Iterator[None]:
    """Short contexts leave positions out, too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(policy_module, "LEAST_KEPT", LEAST)
        yield


def sparse(chosen: Policy, share: float = SHARE) -> Policy:
    return dataclasses.replace(chosen, sparse_attention=share)


@dataclass(frozen=True)
class Case:
    """A model with KV in a format, and what it answers where nothing is cut, moved or shared."""

    name: str
    path: Path
    kv: str
    requests: list[TokenRequest]
    answers: Answers

    def model(self, dtype: torch.dtype = torch.float64) -> AssembledModel:
        return assembled(self.name, self.path, self.kv, dtype)


def config_of(name: str) -> PreTrainedConfig:
    return tiny_config(name)


def assembled(name: str, path: Path, kv: str, dtype: torch.dtype = torch.float64) -> AssembledModel:
    return assemble_model(path, config_of(name), dtype, kv_format=kv_format(kv, dtype))


@pytest.fixture(scope="module", params=MODELS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    path = tmp_path_factory.mktemp(request.param)
    save(build(config_of(request.param)), path)
    return request.param, path


@pytest.fixture(scope="module", params=KV_FORMATS)
def case(folder: tuple[str, Path], request: pytest.FixtureRequest) -> Case:
    model = assembled(*folder, request.param)
    requests = asked(model.spec.vocab_size)
    return Case(*folder, request.param, requests, answered(model, sparse(WHOLE), requests, folder[1]))


@pytest.mark.matrix(8, always=["auto-llama-everywhere", "int4-gpt_oss-small chunks", "auto-opt-disk"])
@pytest.mark.parametrize("place", POLICIES)
def test_placement_does_not_change_answers(case: Case, place: str) -> None:
    assert_same(answered(case.model(), sparse(POLICIES[place]), case.requests, case.path), case.answers)


@pytest.mark.matrix(2)
def test_shared_prefixes_do_not_change_answers(case: Case) -> None:
    census = PrefixCensus(WHOLE.page_tokens)
    for each in case.requests:
        census.add(each.prompt_token_ids)
    for place in ("small chunks", "everywhere"):
        assert_same(answered(case.model(), sparse(POLICIES[place]), case.requests, case.path, census.common()), case.answers)


@pytest.mark.matrix(3, always=["auto-llama-small chunks", "int4-llama-everywhere"])
@pytest.mark.parametrize("place", ["small chunks", "everywhere"])
def test_resumed_answers_go_on_alike(case: Case, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Generated tokens that are computed with the prompt, a few at a time, keep what they kept as next tokens."""
    monkeypatch.setattr("flexgen.kernels.sparse.SPARSE_SCORES_BYTES", 1_000)
    before = 7
    requests = [
        dataclasses.replace(each, generated=Generated(token_ids=tuple(case.answers.tokens[each.index][:before]))) for each in case.requests
    ]
    got = answered(case.model(), sparse(POLICIES[place]), requests, case.path)
    assert got.tokens == case.answers.tokens
    for index, logits in case.answers.logits.items():
        torch.testing.assert_close(got.logits[index], logits[before:], rtol=0, atol=1e-9)


@pytest.mark.matrix(1, always=["auto-llama", "int4-opt"])
def test_preempted_answers_go_on_alike(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LengthForecast, "expect", lambda self, most: 1)
    groups = case.model().spec.kv_groups
    page, tail = (
        WHOLE.page_tokens * sum(group.num_layers * getattr(group, f"{kind}bytes_per_token") for group in groups) for kind in KINDS
    )
    chosen = sparse(placed("cpu", 5, kv={"host": 1.0}, kv_host_bytes=14 * page + WHOLE.max_num_seqs * tail, longest_sequence=64))
    with Engine(case.model(), chosen) as engine:
        results = {each.index: list(each.token_ids) for each in engine.generate(case.requests)}
        assert engine.log.counts.preemptions > 0
    assert results == case.answers.tokens


@pytest.mark.matrix(3)
def test_positions_are_left_out_and_counted(case: Case) -> None:
    """Answers differ from dense ones; what is not read is counted where single values are read, so not on disk."""
    dense = answered(case.model(), WHOLE, case.requests, case.path)
    assert any((dense.logits[index][1] - logits[1]).abs().max() > 1e-6 for index, logits in case.answers.logits.items())
    found = {}
    for home in ("host", "disk"):
        model, chosen = case.model(torch.float32), sparse(placed("cpu", 64, kv={home: 1.0}))
        with Engine(model, dataclasses.replace(chosen, dtype="float32"), offload_dir=case.path) as engine:
            assert all(each.error is None for each in engine.generate(case.requests))
            found[home] = engine.log.values_attended()
    assert 0 < found["host"]["unread"] < found["host"]["seen"]
    assert found["disk"] == {"seen": found["host"]["seen"], "unread": 0}


@pytest.mark.matrix(2, always=["auto-llama", "int4-llama"])
def test_keeping_all_changes_no_bit(case: Case) -> None:
    dense = answered(case.model(torch.float32), dataclasses.replace(WHOLE, dtype="float32"), case.requests, case.path)
    whole = answered(case.model(torch.float32), sparse(dataclasses.replace(WHOLE, dtype="float32"), 1.0), case.requests, case.path)
    assert whole.tokens == dense.tokens
    assert all(torch.equal(logits, dense.logits[index]) for index, logits in whole.logits.items())


class Checked:
    """Compiled kernels in float32, each result of which is compared with the same attention in float64 where that decides what is kept.

    How far products and results may be off follows from float32's roundoff and the sizes of what is added up.  A sealed key is least +
    scale * code, maybe rotated: together the parts are at most three times its largest number, which its norm bounds in either form.

    Attributes:
        num_heads: How many heads of queries there were.
        num_compared: How many of them were compared.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.num_heads = self.num_compared = 0
        for name, in_float64 in (("decode_sparse_attention", _plain_in_float64), ("decode_sparse_sealed_attention", _sealed_in_float64)):
            patch.setattr(CpuKernels, name, self._checking(getattr(CpuKernels, name), in_float64))

    def _checking(self, own: Any, in_float64: Any) -> Any:
        def checking(kernels: CpuKernels, query: torch.Tensor, *where: Any, **how: Any) -> int:
            unread = own(kernels, query, *where, **how)
            self._check(query, where, how, in_float64)
            return unread

        return checking

    def _check(self, query: torch.Tensor, where: tuple[Any, ...], how: dict[str, Any], in_float64: Any) -> None:
        *_, starts, lengths, kept = where
        for row, (start, length, number) in enumerate(zip(starts.clamp(min=0).tolist(), lengths.tolist(), kept.tolist(), strict=True)):
            key, value, page = in_float64(row, start, length, *where)
            for head in range(query.shape[1]):
                shared = head * key.shape[1] // query.shape[1]
                sink = None if how["sinks"] is None else how["sinks"][head : head + 1]
                self._compare(
                    query[row, head].double(), key[:, shared], value[:, shared], number, (length - 1) // page * page - start,
                    how["out"][row, head], (how["scaling"], how["softcap"], sink),
                )  # fmt: skip

    def _compare(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, number: int, border: int, found: torch.Tensor, how: Any
    ) -> None:
        self.num_heads += 1
        scaling, softcap, sink = how
        products, dim = (key @ query).numpy(), len(query)
        product_error = 2 * (dim + 2) * ROUNDOFF * 3 * math.sqrt(dim) * float(query.norm() * key.norm(dim=1).max())
        ranked = np.sort(products)[::-1]
        if ranked[number - 1] - ranked[number] <= 2 * product_error:
            return
        self.num_compared += 1
        keeps = torch.from_numpy(kept_by(products, number, border))
        exact = dense(query[None], key[keeps][:, None], value[keeps][:, None], scaling, softcap, sink)[0]
        score_error = scaling * product_error + 8 * ROUNDOFF * scaling * np.abs(products).max()
        # Each weight is off by the factor exp(score_error) at most, the sum of the weights by the same, and both are rounded.
        error = 2 * score_error + (len(products) + 16) * ROUNDOFF
        assert np.abs(found.double().numpy() - exact).max() <= 3 * error * float(value.abs().max())


def _plain_in_float64(row: int, start: int, length: int, keys: torch.Tensor, values: torch.Tensor, tables: torch.Tensor, *_: Any) -> Any:
    return *(each.double() for each in gather_kv(keys, values, tables[row], start, length)), keys.shape[-1]


def _sealed_in_float64(
    row: int, start: int, length: int, pages: SealedPages, keys: torch.Tensor, values: torch.Tensor, tables: torch.Tensor,
    tails: torch.Tensor, *_: Any,
) -> Any:  # fmt: skip
    seen = seen_sealed(pages, keys, values, tables[row], tails[row : row + 1], start, length, torch.float64)
    return *(each.double() for each in seen), pages.page_tokens


@pytest.mark.matrix(2, always=["auto-llama", "int4-gpt_oss"])
def test_compiled_kernels_keep_what_they_should_in_whole_models(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    request, checked = TokenRequest(index=0, prompt_token_ids=tokens(43, 3, 100), max_tokens=16), Checked(monkeypatch)
    answered(case.model(torch.float32), sparse(dataclasses.replace(WHOLE, dtype="float32")), [request], case.path)
    assert checked.num_compared > 0.9 * checked.num_heads > 0


def test_tokens_are_those_of_transformers_with_the_same_choice(novels_opt: Path) -> None:
    """A trained model, and all layers of it in transformers, where each head of a generated token is shown what it keeps."""
    config = AutoConfig.from_pretrained(novels_opt)
    request = TokenRequest(index=0, prompt_token_ids=tokens(75, 3, config.vocab_size), max_tokens=20)
    chosen = sparse(dataclasses.replace(WHOLE, kv_host_bytes=32_000_000))
    got = answered(assemble_model(novels_opt, config, torch.float64), chosen, [request], novels_opt)
    AttentionInterface.register("kept", functools.partial(_kept_attention, 75))
    model: Any = AutoModelForCausalLM.from_pretrained(novels_opt, dtype=torch.float64, attn_implementation="kept").eval()
    with torch.no_grad():
        logits = model(torch.tensor([[*request.prompt_token_ids, *got.tokens[0]]])).logits[0, 74:-1]
    assert logits.argmax(-1).tolist() == got.tokens[0]
    torch.testing.assert_close(got.logits[0].double(), logits, rtol=0, atol=1e-4)


def _kept_attention(
    prompt_len: int, module: object, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: object, scaling: float, **_: object
) -> tuple[torch.Tensor, None]:
    """Eager attention over all tokens at once, (1, heads, tokens, dim), token by token."""
    out, page = torch.empty_like(query), WHOLE.page_tokens
    for position in range(query.shape[2]):
        products = query[0, :, position, None] @ key[0, :, : position + 1].transpose(1, 2)  # (heads, 1, positions)
        hidden = torch.zeros_like(products, dtype=torch.bool)
        if position >= prompt_len:
            number = max(math.ceil(SHARE * (position + 1) - 1e-9), LEAST)
            order = products.argsort(dim=-1, descending=True, stable=True)
            hidden.scatter_(-1, order[..., number:], True)
            hidden[..., position // page * page :] = False
        weights = torch.softmax((products * scaling).masked_fill(hidden, -math.inf), dim=-1)
        out[0, :, position] = (weights @ value[0, :, : position + 1])[:, 0]
    return out.transpose(1, 2), None


def test_latents_are_refused(tmp_path: Path) -> None:
    config = tiny_config("deepseek_v3")
    save(build(config), tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"'deepseek_v3' caches latents.*sparse attention would save nothing"):
        assemble_model(tmp_path, config, torch.float32, sparse_attention=0.1)

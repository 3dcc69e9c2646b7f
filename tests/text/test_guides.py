"""Guides: which tokens may come next, step by step, on other threads and after what was generated before; constraints that are refused."""

from __future__ import annotations

import json
import re
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tokenizers
from fakes import EOS, VOCAB
from tokenizer_kinds import make_tokenizer
from tokenizers import AddedToken, decoders, models
from transformers import PreTrainedTokenizerFast

from flexgen import StructuredOutputsParams
from flexgen.errors import RequestError
from flexgen.text.guides import Guides, TokenGuide
from flexgen.text.masks import Mask, MaskThread
from flexgen.text.tokenizer import Tokenizer

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode([text], add_special_tokens=False)[0]


def num_followed(guide: TokenGuide, token_ids: list[int]) -> int:
    """How many of the tokens may come, one after the other."""
    for place, token_id in enumerate(token_ids):
        if not guide.allowed(token_ids[:place])[token_id]:
            return place
    return len(token_ids)


def accepts(guides: Guides, tokenizer: Tokenizer, text: str, **constraint: Any) -> bool:
    """Whether the text is a whole answer: it may be written, and end there."""
    guide = guides.guide(StructuredOutputsParams(**constraint))
    token_ids = ids(tokenizer, text)
    if num_followed(guide, token_ids) < len(token_ids):
        return False
    return guide.is_complete(token_ids) or bool(guide.allowed(token_ids)[EOS])


@pytest.mark.parametrize(
    ("constraint", "right", "wrong"),
    [
        (
            {"json": PERSON},
            ['{"name":"Ada","age":36}', '{"name": "", "age": 0}', '{\n    "name": "é\\n",\n\t"age": 7\n}'],
            [
                '{"age":36,"name":"Ada"}',
                '{"name":"Ada"}',
                '{"name":"Ada","age":100}',
                '{"name":"Ada, L","age":1}',
                '{"name":"Ada","age":36} ',
                "x",
                "",
            ],
        ),
        ({"json": json.dumps(PERSON)}, ['{"name":"Ada","age":36}'], ["{}"]),
        ({"json": {"enum": ["a", 1, None]}}, ['"a"', "1", "null"], ["2", '"b"']),
        ({"json": {}}, ["1", "[]", '{"a": [true]}'], ["tru", "a"]),
        ({"json_object": True}, ["{}", '{"a": {"b": [1, "c"]}}'], ["[]", "1", '{"a"}']),
        ({"json": PERSON, "disable_any_whitespace": True}, ['{"name":"Ada","age":36}'], ['{"name": "Ada","age":36}']),
        ({"json": {**PERSON, "x-guidance": {"whitespace_flexible": False}}}, ['{"name":"Ada","age":36}'], ['{"name": "Ada","age":36}']),
        ({"json": PERSON, "whitespace_pattern": " {2}"}, ['{  "name"  :  "Ada"  ,  "age"  :  36  }'], ['{ "name":"Ada","age":36}']),
        ({"regex": "[a-c]{2,3}-\\d"}, ["ab-1", "abc-9"], ["a-1", "ab-", "xab-1", "ab-1x"]),
        ({"choice": ["yes", "no", "no, never", 'say "x"\n']}, ["yes", "no", "no, never", 'say "x"\n'], ["y", "maybe", "no,"]),
        ({"grammar": 'start: "a" b*\nb: "b" | "(" start ")"'}, ["a", "abb", "ab(ab)"], ["b", "a(b"]),
        ({"grammar": 'root ::= "x" tail\ntail ::= "y" | "z"'}, ["xy", "xz"], ["x", "xx"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_an_answer_may_be(
    guides: Guides, tokenizer: Tokenizer, constraint: dict[str, Any], right: list[str], wrong: list[str]
) -> None:
    assert [text for text in right if not accepts(guides, tokenizer, text, **constraint)] == []
    assert [text for text in wrong if accepts(guides, tokenizer, text, **constraint)] == []


def test_white_space_has_a_bound(guides: Guides, tokenizer: Tokenizer) -> None:
    """A model that has lost its thread would write it until the answer is cut off."""
    guide = guides.guide(StructuredOutputsParams(json=PERSON))
    for text in ("{" + " " * 500, "{" + "\n" * 500, "{\n" + " " * 500):
        assert num_followed(guide, ids(tokenizer, text)) < 30
    assert num_followed(guide, ids(tokenizer, "{\n" + " " * 20)) == 22


def test_an_answer_that_nothing_can_continue_is_complete(guides: Guides, tokenizer: Tokenizer) -> None:
    whole = {
        '{"name":"","age":1}': StructuredOutputsParams(json=PERSON),
        "yes": StructuredOutputsParams(choice=["no", "yes"]),
        "ab": StructuredOutputsParams(regex="ab"),
    }
    for text, params in whole.items():
        guide = guides.guide(params)
        token_ids = ids(tokenizer, text)
        assert [guide.is_complete(token_ids[: place + 1]) for place in range(len(token_ids))] == [False] * (len(token_ids) - 1) + [True]


def test_the_end_is_allowed_where_an_answer_may_end(guides: Guides, tokenizer: Tokenizer) -> None:
    guide = guides.guide(StructuredOutputsParams(choice=["no", "no, never"]))
    token_ids = ids(tokenizer, "no, never")
    assert [bool(guide.allowed(token_ids[:place])[EOS]) for place in range(len(token_ids))] == [
        place == 2 for place in range(len(token_ids))
    ]
    assert not guide.is_complete(token_ids[:2])


def test_an_end_that_is_ignored_is_never_allowed(guides: Guides, tokenizer: Tokenizer) -> None:
    guide = guides.guide(StructuredOutputsParams(regex="a+"), ignore_eos=True)
    allowed = guide.allowed(ids(tokenizer, "aa"))
    assert np.flatnonzero(allowed).tolist() == ids(tokenizer, "a")


def test_special_tokens_are_no_text(guides: Guides, tokenizer: Tokenizer) -> None:
    guide = guides.guide(StructuredOutputsParams(regex="(?s:.)*"))
    allowed = guide.allowed([])
    assert not allowed[257], "<pad>"
    assert allowed[EOS]
    assert allowed[ids(tokenizer, "a")[0]]


@pytest.mark.parametrize("vocab_size", [200, VOCAB, 1000])
def test_heads_of_any_size(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Some models compute more logits than the tokenizer has tokens, some fewer."""
    guides = Guides(tokenizer, vocab_size, frozenset({EOS}))
    allowed = guides.guide(StructuredOutputsParams(choice=["a"])).allowed([])
    assert len(allowed) >= vocab_size
    assert np.flatnonzero(allowed).tolist() == ids(tokenizer, "a")
    guides.close()


def test_every_token_that_ends_answers_is_known(tokenizer: Tokenizer) -> None:
    guides = Guides(tokenizer, VOCAB, frozenset({EOS, 257}))
    allowed = guides.guide(StructuredOutputsParams(regex="a*")).allowed([])
    assert set(np.flatnonzero(allowed).tolist()) == {EOS, 257, *ids(tokenizer, "a"), *ids(tokenizer, "aa")}
    guides.close()


def test_what_was_generated_before_is_replayed(guides: Guides, tokenizer: Tokenizer) -> None:
    params = StructuredOutputsParams(json=PERSON)
    token_ids = ids(tokenizer, '{"name":"Ada","age":3')
    step_by_step, at_once = guides.guide(params), guides.guide(params)
    for place in range(len(token_ids)):
        step_by_step.allowed(token_ids[:place])
    np.testing.assert_array_equal(step_by_step.allowed(token_ids), at_once.allowed(token_ids))
    fewer = token_ids[:3]  # another run of the same request
    np.testing.assert_array_equal(step_by_step.allowed(fewer), guides.guide(params).allowed(fewer))
    step_by_step.forget()
    np.testing.assert_array_equal(step_by_step.allowed(token_ids), at_once.allowed(token_ids))


def test_tokens_that_the_constraint_forbids_are_the_error_of_their_request(guides: Guides, tokenizer: Tokenizer) -> None:
    guide = guides.guide(StructuredOutputsParams(choice=["ab"]))
    for _ in range(2):
        with pytest.raises(RequestError) as caught:
            guide.allowed(ids(tokenizer, "x"))
        assert caught.value.code == "constraint_failed"


def test_masks_are_filled_on_another_thread_and_once(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that are asked for while it is busy are filled together."""
    calls: list[tuple[str, int]] = []
    fill, busy = MaskThread._fill, threading.Event()

    def noted(self: MaskThread, masks: list[Mask]) -> None:
        calls.append((threading.current_thread().name, len(masks)))
        busy.wait()
        fill(self, masks)

    monkeypatch.setattr(MaskThread, "_fill", noted)
    guides = Guides(tokenizer, VOCAB, frozenset({EOS}))
    several = [guides.guide(StructuredOutputsParams(choice=["ab"])) for _ in range(10)]
    several[0].prepare([])
    while not calls:
        time.sleep(0.001)
    for guide in several * 2:
        guide.prepare([])
    busy.set()
    for guide in several * 2:
        assert np.flatnonzero(guide.allowed([])).tolist() == ids(tokenizer, "a")
    assert calls == [("flexgen-masks", 1), ("flexgen-masks", 9)]
    guides.close()


def test_what_breaks_while_a_mask_is_filled_is_told_to_who_waits(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> None:
        raise ZeroDivisionError("here")

    guides = Guides(tokenizer, VOCAB, frozenset({EOS}))
    guide = guides.guide(StructuredOutputsParams(choice=["ab"]))
    with monkeypatch.context() as patch:
        patch.setattr("llguidance.numpy.fill_next_token_bitmask_par", broken)
        guide.prepare([])
        with pytest.raises(ZeroDivisionError):
            guide.allowed([])
    guide.forget()
    assert guide.allowed([]).any(), "the thread goes on"
    guides.close()


def test_answers_of_one_constraint_do_not_disturb_each_other(guides: Guides, tokenizer: Tokenizer) -> None:
    params = StructuredOutputsParams(regex="(ab|cd)*")
    several = [guides.guide(params) for _ in range(20)]
    texts = [ids(tokenizer, "ab" * (place % 3) + "cd"[: place % 2]) for place in range(20)]
    for guide, text in zip(several, texts, strict=True):
        guide.prepare(text)
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda pair: pair[0].allowed(pair[1]), zip(several, texts, strict=True)))
    for allowed, text in zip(found, texts, strict=True):
        np.testing.assert_array_equal(allowed, guides.guide(params).allowed(text))


def test_a_constraint_is_compiled_once(tokenizer: Tokenizer) -> None:
    guides = Guides(tokenizer, VOCAB, frozenset({EOS}))
    for _ in range(3):
        guides.guide(StructuredOutputsParams(json=PERSON))
    assert guides._compiled.cache_info().misses == 1
    guides.close()


# -- refusals ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("constraint", "named"),
    [
        ({"json": {"type": "array", "items": {"type": "integer"}, "uniqueItems": True}}, "uniqueItems"),
        ({"json": {"type": "object", "properties": {"a": {"not": {"type": "string"}}}}}, "not"),
        ({"json": {"if": {"type": "string"}, "then": {"minLength": 2}}}, "if"),
        ({"json": {"type": "array", "contains": {"type": "integer"}}}, "contains"),
        ({"json": {"type": "string", "format": "iri"}}, "iri"),
        ({"json": {"type": "strnig"}}, "strnig"),
        ({"json": {"$ref": "https://example.com/schema.json"}}, "example.com"),
        ({"regex": "a(b"}, r"^structured_outputs: the regular expression 'a\(b' cannot be used: "),
        ({"regex": "a(?=b)"}, "structured_outputs"),
        ({"grammar": "start: missing"}, "the grammar cannot be used: .*missing"),
        (
            {"json": {"type": "string", "minLength": 5, "maxLength": 3}},
            r"nothing meets it: .*minLength \(5\) is greater than maxLength \(3\)",
        ),
        ({"json": {"enum": []}}, "the JSON schema cannot be used: "),
        ({"json": {"type": "object", "properties": {"a": {"enum": []}}, "required": ["a"]}}, "nothing meets it: .*'a'"),
        ({"json": {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}}, "always contains itself again"),
        ({"regex": r"[^\s\S]"}, "nothing meets it: no answer could even begin"),
        ({"regex": r"ab[a&&b]"}, "nothing meets it: no answer could even begin"),
        ({"grammar": 'start: "a" start'}, "the grammar cannot be used: .*always contains itself again"),
        ({"grammar": "start: "}, "the grammar cannot be used: only the empty text meets it"),
        ({"grammar": 'start: a a\na: "" |'}, "the grammar cannot be used: only the empty text meets it"),
        ({"regex": "(){3}"}, r"the regular expression '\(\)\{3\}' cannot be used: only the empty text meets it"),
        ({"grammar": 'root ::= "(" root ")"'}, "always contains itself again"),
        (
            {"grammar": r'start: "ab" b' + "\nb: /[^\\s\\S]/"},
            "nothing meets it: every answer would have to begin with 'ab', and nothing can follow",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_enforced_is_named(guides: Guides, constraint: dict[str, Any], named: str) -> None:
    with pytest.raises(RequestError, match=named) as caught:
        guides.guide(StructuredOutputsParams(**constraint))
    assert (caught.value.code, caught.value.param) == ("unsupported_constraint", "structured_outputs")
    assert len(str(caught.value)) < 600
    assert "\n" not in str(caught.value)


LLGUIDANCE_S = re.compile(r"NoExtension|InternalError|Unsatisfiable|non-verbose|\s\^|\d \|")


@pytest.mark.parametrize(
    "constraint",
    [{"json": {"enum": []}}, {"regex": "a("}, {"regex": "[^\\s\\S]"}, {"grammar": "start: (\n"}, {"grammar": "start: b"}],
    ids=str,
)
def test_refusals_are_in_words(guides: Guides, constraint: dict[str, Any]) -> None:
    with pytest.raises(RequestError) as caught:
        guides.guide(StructuredOutputsParams(**constraint))
    assert not LLGUIDANCE_S.search(str(caught.value)), str(caught.value)


def test_whole_answers_are_accepted(guides: Guides) -> None:
    schema = StructuredOutputsParams(json=PERSON)
    texts = ['{"name":"Ada","age":36}', '{"age":36,"name":"Ada"}', '{"name":"Ada"', "", '{"name":"Ada","age":36} x']
    assert [guides.accepts(schema, text) for text in texts] == [True, False, False, False, False]
    assert [guides.accepts(StructuredOutputsParams(regex="é+(ab)?"), text) for text in ("éé", "éab", "éa", "")] == [
        True,
        True,
        False,
        False,
    ]


def test_without_llguidance_the_extra_is_named(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "llguidance"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(RequestError, match=r"pip install 'flexgen-engine\[grammar\]'"):
        Guides(tokenizer, VOCAB, frozenset({EOS})).guide(StructuredOutputsParams(choice=["a"]))


def test_without_a_usable_tokenizer() -> None:
    with pytest.raises(RequestError, match="needs a tokenizer"):
        Guides(None, VOCAB, frozenset()).guide(StructuredOutputsParams(choice=["a"]))
    slow: Any = SimpleNamespace(hf=SimpleNamespace(is_fast=False))
    with pytest.raises(RequestError, match="fast tokenizer"):
        Guides(slow, VOCAB, frozenset()).guide(StructuredOutputsParams(choice=["a"]))


# -- kinds of tokenizers ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama2", "gemma", "byte-level"])
def test_kinds_of_tokenizers(kind: str) -> None:
    """Only that those pieces are allowed whose texts the constraint has."""
    tokenizer = make_tokenizer(kind)
    guides = Guides(tokenizer, len(tokenizer.hf), frozenset({2}))
    allowed = guides.guide(StructuredOutputsParams(choice=["stood", "xa"])).allowed([])
    pieces = {tokenizer.token_text(token_id) for token_id in np.flatnonzero(allowed).tolist()}
    assert "stood" in pieces
    assert pieces <= {"s", "stood", "x"}
    guides.close()


@pytest.fixture(scope="module")
def poor() -> Iterator[Guides]:
    """Guides for a vocabulary of "a", "b" and the end."""
    backend = tokenizers.Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("</s>", special=True)])
    made = Guides(Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")), 3, frozenset({2}))
    yield made
    made.close()


@pytest.mark.parametrize("constraint", [{"choice": ["ab!"]}, {"choice": ["ab", "b!"]}, {"regex": "ab!"}], ids=str)
def test_a_vocabulary_that_cannot_write_what_is_asked_for(poor: Guides, constraint: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="the model's vocabulary cannot write '!'") as caught:
        poor.guide(StructuredOutputsParams(**constraint))
    assert caught.value.code == "unsupported_constraint"
    poor.guide(StructuredOutputsParams(choice=["ab", "b"]))


@pytest.mark.parametrize(("regex", "first"), [("a(b!|a!)", [0]), ("ab!|b!", [0, 1])])
def test_a_vocabulary_that_cannot_write_the_end(poor: Guides, regex: str, first: list[int]) -> None:
    """It is found when the answer is there: it must not end as if it were whole."""
    guide = poor.guide(StructuredOutputsParams(regex=regex))
    assert np.flatnonzero(guide.allowed([])).tolist() == first
    with pytest.raises(RequestError, match="after 2 tokens no token of the vocabulary goes on as the constraint on the answer") as caught:
        guide.allowed([0, 1])
    assert caught.value.code == "constraint_failed"


def test_a_tokenizer_that_llguidance_does_not_read() -> None:
    tokenizer = make_tokenizer("metaspace-never")
    with pytest.raises(RequestError, match="does not understand the tokenizer"):
        Guides(tokenizer, len(tokenizer.hf), frozenset({2})).guide(StructuredOutputsParams(choice=["a"]))

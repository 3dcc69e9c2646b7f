"""Stop strings against a plain search in the text of every prefix."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizer_kinds import KINDS, ids_of, make_tokenizer

from flexgen.text.stop_strings import StopStrings, cut_at_stop
from flexgen.text.stream import decode_behind
from flexgen.text.tokenizer import UNFINISHED, Tokenizer


@pytest.fixture(scope="module")
def tokenizer(model_folder: Path) -> Tokenizer:
    """Of bytes."""
    return Tokenizer.load(model_folder)


@pytest.fixture(scope="module")
def novels(novels_opt: Path) -> Tokenizer:
    """Of words and their parts."""
    return Tokenizer.load(novels_opt)


def first_stop(tokenizer: Tokenizer, ids: list[int], stop: list[str], min_tokens: int) -> tuple[int, str, str] | None:
    """Plainly: the number of ids after which a stop string is complete, which it is, and the text before it."""
    texts = [tokenizer.decode(ids[:count]).rstrip(UNFINISHED) for count in range(len(ids) + 1)]
    for count in range(min_tokens + 1, len(ids) + 1):
        text, old = texts[count], len(texts[count - 1])
        ends = [(place, each) for each in stop for place in range(len(text)) if text.startswith(each, place) and place + len(each) > old]
        if ends:
            place, each = min(ends, key=lambda end: end[0])
            return count, each, text[:place]
    return None


def watched(tokenizer: Tokenizer, ids: list[int], stop: list[str], min_tokens: int) -> tuple[int, str, str] | None:
    """What an engine and its caller do."""
    stops = StopStrings(tokenizer, stop, min_tokens=min_tokens)
    for count in range(1, len(ids) + 1):
        if (found := stops(ids[:count])) is not None:
            text, before = tokenizer.decode(ids[:count]), tokenizer.decode(ids[: count - 1])
            return count, found, cut_at_stop(text, before, found, include=False)
    return None


@given(
    text=st.text(alphabet="ab é☕", max_size=25),
    stop=st.lists(st.text(alphabet="ab é☕", min_size=1, max_size=3), min_size=1, max_size=4),
    min_tokens=st.integers(0, 12),
)
def test_byte_by_byte(tokenizer: Tokenizer, text: str, stop: list[str], min_tokens: int) -> None:
    (ids,) = tokenizer.encode([text])
    assert watched(tokenizer, ids, stop, min_tokens) == first_stop(tokenizer, ids, stop, min_tokens)


@given(data=st.data())
def test_in_tokens_of_several_characters(novels: Tokenizer, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(4, 2000), min_size=1, max_size=20))
    text = novels.decode(ids)
    spans = st.tuples(st.integers(0, max(0, len(text) - 1)), st.integers(1, 6))
    stop = [text[start : start + length] or "x" for start, length in data.draw(st.lists(spans, min_size=1, max_size=3))]
    stop = [each for each in stop if UNFINISHED not in each] or ["x"]
    min_tokens = data.draw(st.integers(0, 6))
    assert watched(novels, ids, stop, min_tokens) == first_stop(novels, ids, stop, min_tokens)


@pytest.mark.parametrize(
    ("stop", "include", "wanted"),
    [("☕", False, "two "), ("☕", True, "two ☕"), ("wo ☕", False, "t"), ("wo ☕", True, "two ☕")],
)
def test_the_text_is_cut(tokenizer: Tokenizer, stop: str, include: bool, wanted: str) -> None:
    text = "two ☕"
    (ids,) = tokenizer.encode([text])
    assert cut_at_stop(text, tokenizer.decode(ids[:-1]), stop, include=include) == wanted


def test_what_came_within_min_tokens_is_not_cut() -> None:
    assert cut_at_stop("a.b.", "a.b", ".", include=False) == "a.b"


def test_text_that_is_tidied_up_as_a_whole_is_not_cut() -> None:
    assert cut_at_stop("it's", "it '", " 's", include=False) == "it's"


def test_many_ids_at_once_are_as_one_by_one(tokenizer: Tokenizer) -> None:
    """As when an interrupted answer goes on."""
    (ids,) = tokenizer.encode(["one. two. three"])
    stops = StopStrings(tokenizer, ["."], min_tokens=4)
    assert stops(ids[:6]) is None
    assert stops(ids[:9]) == "."


def test_another_run_begins_anew(tokenizer: Tokenizer) -> None:
    (ids,) = tokenizer.encode(["ab.cd"])
    stops = StopStrings(tokenizer, ["b.c"])
    for _ in range(2):
        assert [stops(ids[:count]) for count in range(1, 5)] == [None, None, None, "b.c"]


def test_special_tokens_count_only_where_they_are_text(tokenizer: Tokenizer) -> None:
    ids = [64, 256, 65]
    assert StopStrings(tokenizer, ["</s>"])(ids) is None
    assert StopStrings(tokenizer, ["ab"])(ids) == "ab"
    assert StopStrings(tokenizer, ["</s>"], skip_special_tokens=False)(ids) == "</s>"


# -- behind a prompt ------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> Tokenizer:
    return make_tokenizer(request.param)


@given(data=st.data())
def test_any_part_of_an_answer_stops_it(kind: Tokenizer, data: st.DataObject) -> None:
    """As soon as it is complete, wherever it begins, and none of it is left."""
    token_id = st.integers(0, len(kind.hf) - 1)
    prompt, ids = data.draw(st.lists(token_id, max_size=8)), data.draw(st.lists(token_id, min_size=1, max_size=8))
    text = decode_behind(kind, prompt, ids)
    start = data.draw(st.integers(0, max(0, len(text) - 1)))
    stop = text[start : start + data.draw(st.integers(1, 8))]
    if not stop or UNFINISHED in text:
        return
    stops = StopStrings(kind, [stop], prompt=prompt)
    count = next(count for count in range(1, len(ids) + 1) if stops(ids[:count]) is not None)
    texts = [decode_behind(kind, prompt, ids[:each]) for each in (count, count - 1)]
    assert stop in texts[0]
    assert stop not in texts[1]
    assert cut_at_stop(*texts, stop, include=False) == text[: text.index(stop)]
    assert cut_at_stop(*texts, stop, include=True) == text[: text.index(stop) + len(stop)]


@pytest.mark.parametrize("prompt", [["▁a", ":"], ["▁a", "<|assistant|>", "<s>"], ["<0x0A>"]], ids=str)
def test_a_space_at_the_beginning_of_an_answer_is_seen(prompt: list[str]) -> None:
    llama = make_tokenizer("llama2")
    before, ids = ids_of(llama, *prompt), ids_of(llama, "▁stood", "▁stood", "▁stood")
    assert StopStrings(llama, [" stood"], prompt=before)(ids[:1]) == " stood"
    assert StopStrings(llama, ["stood s", "x"], prompt=before)(ids) == "stood s", "many at once, as when an answer goes on"
    held = StopStrings(llama, [" stood"], prompt=before, min_tokens=2)
    assert [held(ids[:count]) for count in (1, 2, 3)] == [None, None, " stood"]


def test_what_stands_in_the_prompt_stops_nothing() -> None:
    llama = make_tokenizer("llama2")
    before, ids = ids_of(llama, "▁stood", "▁stood"), ids_of(llama, "a", "a")
    assert StopStrings(llama, ["stooda", "stood", "d"], prompt=before)(ids) is None

"""Small tokenizers of the kinds that models have, of a few pieces each.  Their decoders differ in what they do with spaces and bytes."""

from __future__ import annotations

import tokenizers
from tokenizers import AddedToken, decoders, models
from transformers import PreTrainedTokenizerFast

from flexgen.text.tokenizer import Tokenizer

SPECIAL = ["<unk>", "<s>", "</s>", "<|assistant|>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
WORDS = ["▁", "▁▁", "▁▁▁", "▁stood", "stood", "▁return", "a", "▁a", ":", "\n", "☕", "▁é", "<|end|>"]
KINDS = ("llama2", "gemma", "metaspace-always", "metaspace-first", "metaspace-never", "byte-level", "wordpiece", "bpe-suffix")


def make_tokenizer(kind: str) -> Tokenizer:
    """A tokenizer that knows ids and texts of its vocabulary; it is good for decoding, and encodes only what its pieces allow."""
    pieces, decoder = _parts(kind)
    vocab = {piece: token_id for token_id, piece in enumerate(dict.fromkeys([*SPECIAL, *pieces]))}
    model = models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback="<0x0A>" in vocab)
    backend = tokenizers.Tokenizer(model if kind != "wordpiece" else models.WordPiece(vocab=vocab, unk_token="<unk>"))
    backend.decoder = decoder
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    backend.add_tokens([AddedToken("<|end|>", special=False, normalized=False)])
    hf = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    return Tokenizer(hf)


def ids_of(tokenizer: Tokenizer, *pieces: str) -> list[int]:
    """By the vocabulary's own names."""
    ids = tokenizer.hf.convert_tokens_to_ids(list(pieces))
    assert isinstance(ids, list)
    assert tokenizer.hf.convert_ids_to_tokens(ids) == list(pieces)
    return ids


def _parts(kind: str) -> tuple[list[str], decoders.Decoder]:
    spaces, whole_bytes = decoders.Replace("▁", " "), decoders.ByteFallback()
    if kind == "llama2":
        return [*BYTES, *WORDS], decoders.Sequence([spaces, whole_bytes, decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    if kind == "gemma":
        return [*BYTES, *WORDS], decoders.Sequence([spaces, whole_bytes, decoders.Fuse()])
    if kind.startswith("metaspace"):
        return WORDS, decoders.Metaspace(prepend_scheme=kind.removeprefix("metaspace-"))
    if kind == "byte-level":
        return [*_byte_level_alphabet(), "Ġstood", "stood", "ĠĠ", "Ġð", "ŁĮ"], decoders.ByteLevel()
    if kind == "wordpiece":
        return ["stood", "##stood", "a", "##s", ".", "'", "the", "☕"], decoders.WordPiece("##", cleanup=True)
    return ["stood", "stood</w>", "a", "a</w>", ".</w>", "☕</w>"], decoders.BPEDecoder("</w>")


def _byte_level_alphabet() -> list[str]:
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())

"""The beginnings that prompts of a job have in common: a prefix tree over whole pages of token ids.

A node of the tree is named by a digest of all tokens up to it (a chain of hashes over pages, as in vLLM's automatic
prefix caching), so the tree is one table: digest -> number of requests that pass it.  Knows no memory and no engines.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

DIGEST_BYTES = 16  # a collision would mix up two prompts: at 2^40 pages its probability is below 2^-48
MAX_PAGES = 1 << 18  # about 40 MB of table


@dataclass(frozen=True, slots=True, kw_only=True)
class CommonPrefix:
    """A node of the tree at which requests part or end, so that what is computed up to it is worth keeping.

    Attributes:
        length: Number of tokens, a multiple of the page.
        digest: Digest of those tokens.
        num_requests: Number of requests that begin with them.
    """

    length: int
    digest: bytes
    num_requests: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CommonPrefixes:
    """The prefixes that at least two requests of a job have in common.

    Attributes:
        page_tokens: Tokens of a page; only whole pages are shared.
        num_requests: Digest of every shared page -> number of requests that can begin with the tokens up to its end.
    """

    page_tokens: int
    num_requests: Mapping[bytes, int] = field(repr=False)

    def path(self, prompt: Sequence[int]) -> tuple[CommonPrefix, ...]:
        """Return the common prefixes of a prompt, shortest first.

        The prompt's last token is in none of them, because a sequence must compute the token after which it samples.
        """
        points: list[CommonPrefix] = []
        for number, digest in enumerate(_page_digests(prompt, self.page_tokens), 1):
            if (count := self.num_requests.get(digest)) is None:
                break
            if points and points[-1].num_requests == count:
                points.pop()  # nobody leaves between the two
            points.append(CommonPrefix(length=number * self.page_tokens, digest=digest, num_requests=count))
        return tuple(points)

    def beyond(self, prompt: Sequence[int], offered: Sequence[int]) -> tuple[CommonPrefix, ...]:
        """Return the common prefixes that end within `offered`, shortest first.

        Args:
            prompt: The tokens with which a request can begin, see `path`.
            offered: The tokens after them whose KV the request computes, too, although it cannot begin with it.
        """
        own = (len(prompt) - 1) // self.page_tokens
        if not self.num_requests or (len(prompt) + len(offered)) // self.page_tokens <= own:
            return ()
        return tuple(point for point in self.path((*prompt, *offered, 0)) if point.length > own * self.page_tokens)


NO_PREFIXES = CommonPrefixes(page_tokens=1, num_requests={})


class PrefixCensus:
    """Counts how many requests pass each node of the tree, in bounded memory.

    When the table has grown to `max_pages`, the rarest nodes are dropped until half of it is free.  This loses prefixes whose requests
    lie far apart: at first those of two requests with about `max_pages` pages of other prompts between them.

    Args:
        page_tokens: Tokens of a page.
        max_pages: Most nodes that are counted.
    """

    def __init__(self, page_tokens: int, max_pages: int = MAX_PAGES) -> None:
        self._page_tokens, self._max_pages = page_tokens, max_pages
        self._counts: dict[bytes, int] = {}
        self._offered: set[bytes] = set()  # nodes that a request computes without being able to begin with them

    def add(self, prompt: Sequence[int], offered: Sequence[int] = ()) -> int:
        """Count a request.

        Args:
            prompt: The tokens with which it can begin, see `CommonPrefixes.path`.
            offered: The tokens after them whose KV it computes, too, although it cannot begin with it.

        Returns:
            Number of leading tokens of its prompt that earlier requests have too, in whole pages: it need not compute them.
        """
        known, own = 0, (len(prompt) - 1) // self._page_tokens
        for number, digest in enumerate(_page_digests((*prompt, *offered, 0), self._page_tokens), 1):
            if number > own:
                self._offered.add(digest)
                continue
            count = self._counts.get(digest, 0)
            self._counts[digest] = count + 1
            if count or digest in self._offered:
                known = number * self._page_tokens
        if len(self._counts) > self._max_pages:
            self._thin_out()
        if len(self._offered) > self._max_pages:
            self._offered.clear()
        return known

    def _thin_out(self) -> None:
        """Drop the rarest nodes.  A node is passed by no more requests than the nodes above it, so what stays is a tree."""
        least = 1
        while len(self._counts) > self._max_pages // 2:
            least += 1
            self._counts = {digest: count for digest, count in self._counts.items() if count >= least}

    def common(self) -> CommonPrefixes:
        """Return the prefixes found so far."""
        shared = {digest: count for digest, count in self._counts.items() if count > 1 or digest in self._offered}
        return CommonPrefixes(page_tokens=self._page_tokens, num_requests=shared)


def _page_digests(prompt: Sequence[int], page_tokens: int) -> Iterator[bytes]:
    """Yield a digest for every whole page before the last token, each of all tokens up to the page's end."""
    ids = array("Q", prompt).tobytes()
    size, digest = page_tokens * 8, b""
    for start in range(0, (len(prompt) - 1) // page_tokens * size, size):
        digest = hashlib.blake2b(digest + ids[start : start + size], digest_size=DIGEST_BYTES).digest()
        yield digest

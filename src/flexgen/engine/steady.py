"""The middle of a job without its beginning: passes are scheduled, but not computed, until the engine is in its steady state."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from flexgen.engine.engine import Engine
from flexgen.engine.sampler import Sampled
from flexgen.request import TokenRequest
from flexgen.text.common_prefixes import NO_PREFIXES


class SteadyEngine(Engine):
    """An engine that can also go through the first passes of a job without computing them.

    What these passes admit, where each sequence's pages are and when answers end is decided as in any run.  A token that is drawn at random
    stands for each one that would have been sampled, and random numbers for the keys and values.
    """

    @contextlib.contextmanager
    def middle(self, requests: Iterable[TokenRequest], *, num_skipped: int, seed: int) -> Iterator[Callable[[], bool]]:
        """Go through the first passes of a job without computing, and lend the passes after these.

        Args:
            requests: The requests, without common prefixes; they are pulled as they are needed.
            num_skipped: The number of passes that are not computed.
            seed: The seed of the random tokens and of the keys and values.

        Yields:
            A function that runs the next pass, and returns whether there was one.

        Raises:
            StorageError: Something could not be read or written, so that the engine cannot continue.
            EngineError: Another run has not ended.
        """
        self._begin(NO_PREFIXES)
        source, tokens = iter(requests), np.random.default_rng(seed)

        def run_pass() -> bool:
            self._take_in(source)
            if self.has_work:
                self.step()
                return True
            return False

        try:
            for _ in range(num_skipped):
                self._take_in(source)
                self._skip(tokens)
            self.runner.fill_kv(self._stored_pages(), seed)
            yield run_pass
        finally:
            self.clear()

    def _take_in(self, source: Iterator[TokenRequest]) -> None:
        """Read requests ahead; none has ended before it was added."""
        for _ in self._read_ahead(source):
            pass

    def _skip(self, tokens: np.random.Generator) -> None:
        """Go through one pass without computing."""
        vocab_size = self.runner.model.spec.vocab_size
        scheduled, _ = self._block.schedule(self.log)
        for batch in scheduled.plan.micro_batches:
            self._block.stored(batch)
            drawn = [Sampled(int(tokens.integers(vocab_size))) for _ in batch.wanted]
            for _ in self._block.append(batch, drawn, self.log):
                pass

    def _stored_pages(self) -> dict[str, list[list[int]]]:
        """Return, for each tier and layer group, the page ids that hold tokens."""
        groups = self.cache.groups
        stored: dict[str, list[list[int]]] = {tier: [[] for _ in groups] for tier in self.cache.pools}
        for sequence in self._block.scheduler.live:
            if (kv := sequence.kv) is not None:
                for pages, group, table, freed in zip(stored[kv.home], groups, kv.tables, kv.freed, strict=True):
                    pages += table[freed : group.num_pages(sequence.num_stored)]
        return stored

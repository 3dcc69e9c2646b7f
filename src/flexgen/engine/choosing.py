"""Makes plain values of what a micro-batch has computed: the next tokens of its sequences, and the log probabilities of its known tokens.

Knows no sequences: whoever has these, on the same stage of a pipeline or on another one, takes the values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from flexgen.devices.packed import PackedCopies
from flexgen.engine.logprobs import start_scoring
from flexgen.engine.runner import BatchOutput
from flexgen.engine.sampler import Sampled
from flexgen.engine.sampling import Sampler
from flexgen.errors import RequestError
from flexgen.passes.plan import MicroBatch
from flexgen.request import TokenLogprobs, TokenRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchAnswer:
    """What a micro-batch has found.

    Attributes:
        scores: The log probabilities of the slices' targets, in the order of the slices and their targets, or the error of each.
        chosen: The next token of each wanted position, in their order, or the error that the row has instead.
    """

    scores: list[TokenLogprobs | RequestError]
    chosen: list[Sampled | RequestError]


class Chooser:
    """Chooses next tokens and scores known ones.

    Args:
        copies: The copies to and from the computing device.
    """

    def __init__(self, copies: PackedCopies) -> None:
        self._copies, self._sampler = copies, Sampler(copies)

    def start(
        self, batch: MicroBatch, output: BatchOutput, requests: Sequence[TokenRequest], generated: Sequence[Sequence[int]]
    ) -> Callable[[], BatchAnswer]:
        """Start to choose and to score; several micro-batches may be started before the first is asked for its answer.

        Args:
            batch: The micro-batch.
            output: What it has computed.
            requests: The request of each row of its logits.
            generated: For each row, the ids generated so far.

        Returns:
            A function that waits for the answer and returns it.
        """
        scoring = None if output.scores is None else start_scoring(output.scores, self._copies)
        choosing = self._sampler.start(output.logits, requests, generated)

        def finish() -> BatchAnswer:
            scores: list[TokenLogprobs | RequestError] = []
            if scoring is not None:
                targets = [target for each in batch.slices for target in each.targets]
                scores = scoring(targets, [each.num_likeliest for each in batch.slices for _ in each.targets])
            return BatchAnswer(scores=scores, chosen=choosing())

        return finish

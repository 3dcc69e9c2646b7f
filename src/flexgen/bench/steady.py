"""`flexgen bench steady`: passes in the middle of a job of random prompts, without those before and after them.

Neither loading nor what comes before the passes is timed.
"""

from __future__ import annotations

from collections.abc import Callable

from flexgen.bench.throughput import random_requests
from flexgen.llm import LLM
from flexgen.plan.workload import Workload
from flexgen.report.progress import Progress
from flexgen.report.steady import SteadyReport


def run_steady(
    llm: LLM, workload: Workload, *, warmup: int, passes: int, on_progress: Callable[[Progress], None] | None = None
) -> SteadyReport:
    """Measure some passes of a job of random prompts, which is planned as a whole.

    Args:
        llm: The model.
        workload: The job.
        warmup: The number of passes that are computed before those that count.
        passes: The number of passes that count.
        on_progress: Called now and then with the progress of the passes.

    Raises:
        OptionError: The job has fewer passes between its beginning and its end.
        CapacityError: The job does not fit the budgets.
    """
    requests = random_requests(llm, workload)
    return llm.model.steady(requests, workload, num_warmup=warmup, num_passes=passes, on_progress=on_progress)

"""Policies of stages: each is a machine with a range of layers. What is found is kept, and shared by machines that are alike."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from flexgen.errors import CapacityError, OptionError
from flexgen.options import EngineOptions
from flexgen.plan.machine import has_device_tier
from flexgen.plan.model import ModelSpec
from flexgen.plan.play.blocks import Blocks
from flexgen.plan.policy import Policy
from flexgen.plan.search.evaluate import Bounds
from flexgen.plan.search.optimise import SHORTEST, Search, Solution
from flexgen.plan.search.point import Point
from flexgen.plan.search.solve import NOMINAL_WORKLOAD, solve, space_of
from flexgen.plan.search.space import Space
from flexgen.plan.stages.cut import Cost
from flexgen.plan.stages.job import StagedJob
from flexgen.plan.stages.spec import num_layers_of, stage_spec
from flexgen.plan.tell.forecast import Plan, forecast
from flexgen.plan.workload import Workload

# The share of the usual effort of a search with which stages are compared: only their placements are free, and a good one is known.
COMPARING = 0.1
NO_PLAN: Cost = (float("inf"), float("inf"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Common:
    """What all stages do alike, because the same passes go through them.

    Attributes:
        schedule: As in Policy.
        max_num_seqs: As in Policy: the most sequences of a block.
        prefill_tokens: As in Policy; None where the schedule decides.
        micro_batch_tokens: As in Policy.
    """

    schedule: str
    max_num_seqs: int
    prefill_tokens: int | None
    micro_batch_tokens: int

    @classmethod
    def of(cls, policy: Policy) -> Common:
        """Return what a policy does that all stages must do alike."""
        return cls(
            schedule=policy.schedule,
            max_num_seqs=policy.max_num_seqs,
            prefill_tokens=policy.prefill_tokens if policy.schedule == "diagonal" else None,
            micro_batch_tokens=policy.micro_batch_tokens,
        )

    def at(self, point: Point) -> Point:
        """Return the point that does this, with the homes of another."""
        return dataclasses.replace(point, schedule=self.schedule, micro_batch_tokens=self.micro_batch_tokens)

    def of_sequences(self, number: int) -> Common:
        """Return the same for fewer sequences, with as many prompt tokens per sequence."""
        quota = self.prefill_tokens and max(self.prefill_tokens * number // self.max_num_seqs, 1)
        return dataclasses.replace(self, max_num_seqs=number, prefill_tokens=quota)


def block_of(workload: Workload, num_blocks: int) -> Workload:
    """Return the requests of one of so many blocks, between which the requests are dealt out in the order in which they enter."""
    kept = workload.reserved_lens or workload.output_lens
    order = sorted(range(len(workload)), key=lambda place: -kept[place])
    return workload.take(order[::num_blocks])


class StageSearch:
    """The policies of all stages that a job could have.

    Args:
        job: The job.
        num_blocks: The number of blocks in flight.

    Attributes:
        job: The job.
        num_layers: The number of decoder layers of its model.

    Raises:
        OptionError: An option cannot be honoured on stages.
    """

    def __init__(self, job: StagedJob, num_blocks: int) -> None:
        self.job, self.num_layers = job, num_layers_of(job.spec)
        self._blocks = Blocks(num_blocks=num_blocks, num_stages=job.num_stages)
        self._block = block_of(job.workload if len(job.workload) else NOMINAL_WORKLOAD, num_blocks)
        self._options = [self._options_of(each.limits.device) for each in job.machines]
        self._alike = [job.machines.index(each) for each in job.machines]
        self._specs: dict[range, ModelSpec] = {}
        self._signatures: dict[object, int] = {}
        self._signature_of: dict[range, int] = {}
        self._found: dict[tuple[int, int, Common], Solution | None] = {}
        self._rates: dict[tuple[int, int], float] = {}
        self._points: dict[Point, None] = {}
        self._plans: dict[tuple[int, int, Common], Plan] = {}

    def _options_of(self, device: str) -> EngineOptions:
        """Return the options of a stage without bounds on time, which are those of the whole.

        Beside a device the host attends to KV in its memory: a sequence's home is a combination of tiers, one per stage, and the ring that
        brings pages over a link knows the tier of one stage only.
        """
        options = self.job.options
        attention = options.host_attention
        if self.job.num_stages > 1 and has_device_tier(device):
            if attention == "off":
                raise OptionError("host_attention='off': on several stages the host attends to KV in its memory; leave host_attention out")
            attention = "on"
        return dataclasses.replace(options, device=device, host_attention=attention, max_request_seconds=None, max_job_seconds=None)

    def spec(self, layers: range) -> ModelSpec:
        """Return the costs of a stage with these layers."""
        if layers not in self._specs:
            self._specs[layers] = stage_spec(self.job.spec, layers, self.num_layers)
        return self._specs[layers]

    def name(self, stage: int, layers: range) -> str:
        """Return what messages call a stage."""
        machine = self.job.machines[stage].machine
        return f"stage {stage} of {self.job.num_stages} (layers {layers.start} to {layers.stop - 1} on {machine.name})"

    def rate(self, stage: int, layers: range) -> float:
        """Return the tokens/s of the best steady state of a stage by itself; 0 where nothing fits."""
        key = (self._alike[stage], self._signature(layers))
        if key not in self._rates:
            self._rates[key] = Search(self._space(stage, layers, None)).steady_rate()
        return self._rates[key]

    @property
    def are_unequal(self) -> bool:
        """Whether some machines or budgets differ from others."""
        return len(set(self._alike)) > 1

    def common(self, stage: int, layers: range, bounds: Bounds, patience: float | None) -> Common:
        """Return what is best for a stage by itself.

        Args:
            stage: The number of the stage.
            layers: Its layers.
            bounds: The bounds on the passes of a block there; SHORTEST for the plan with the shortest requests.
            patience: How many times the usual effort the search may spend; None for once.

        Raises:
            CapacityError: Nothing fits, or nothing is as fast as the bounds require.
        """
        space = self._space(stage, layers, None)
        search = Search(space) if patience is None else Search(space, patience=patience)
        found = search.shortest() if bounds == SHORTEST else search.best(bounds)
        self._points[found.point] = None  # where other stages are likely to be good, too
        return Common.of(found.policy)

    def cost(self, stage: int, layers: range, common: Common) -> Cost:
        """Return the share of a block's requests that can never fit a stage, and the seconds of its passes there."""
        found = self.found(stage, layers, common)
        return NO_PLAN if found is None else (found.refused, found.seconds)

    def found(self, stage: int, layers: range, common: Common) -> Solution | None:
        """Return about the best placement of a stage; None where nothing fits."""
        key = (self._alike[stage], self._signature(layers), common)
        if key not in self._found:
            try:
                space = self._space(stage, layers, common)
                known = (common.at(point) for point in self._points)
                self._found[key] = Search(space, patience=COMPARING, known=known).best(Bounds())
            except CapacityError:
                self._found[key] = None
        return self._found[key]

    def plan(self, stage: int, layers: range, common: Common, *, hasty: bool) -> Plan:
        """Return the plan of a stage, whose forecast is that of a block's passes there.

        Args:
            stage: The number of the stage.
            layers: Its layers.
            common: What all stages do alike.
            hasty: Whether the placement by which stages were compared is good enough.

        Raises:
            CapacityError: Nothing fits; the message names the stage and its machine.
        """
        key = (self._alike[stage], self._signature(layers), common)
        here = self.job.machines[stage]
        if key not in self._plans:
            space, found = self._space(stage, layers, common, waiting=False), self.found(stage, layers, common)
            try:
                solution = found if found is not None and hasty else solve(space, known=[] if found is None else [found.point])
            except CapacityError as error:
                raise CapacityError(f"{self.name(stage, layers)}: {error}") from error
            told = forecast(solution, space.spec, here.machine, here.limits, self._block, process_bytes=here.process_bytes)
            self._plans[key] = Plan(spec=space.spec, machine=here.machine, policy=solution.policy, forecast=told)
        return dataclasses.replace(self._plans[key], spec=self.spec(layers), machine=here.machine)

    def _space(self, stage: int, layers: range, common: Common | None, *, waiting: bool = True) -> Space:
        """Return the policies of a stage: all, or those with what all stages do alike.

        Where passes are `waiting` for those of other stages, and there are no more blocks than stages, each takes the latency of a link
        longer: stages that take equally long leave no time in which it could pass unnoticed.
        """
        options, here = self._options[stage], self.job.machines[stage]
        machine = here.machine
        if common is not None:
            options = dataclasses.replace(options, **dataclasses.asdict(common))
        if waiting and self._blocks.num_blocks == self.job.num_stages > 1:
            overheads = dataclasses.replace(machine.overheads, per_pass=machine.overheads.per_pass + self.job.link.latency_s)
            machine = dataclasses.replace(machine, overheads=overheads)
        return space_of(
            options, self.spec(layers), machine, here.limits, self._block, process_bytes=here.process_bytes,
            blocks=self._blocks,
        )  # fmt: skip

    def _signature(self, layers: range) -> int:
        """Return a number that ranges have in common whose stages cost the same: other layers, but alike."""
        if layers not in self._signature_of:
            spec = self.spec(layers)
            units = tuple(dataclasses.replace(unit, name="") for unit in spec.units)
            groups = tuple(dataclasses.replace(group, layers=()) for group in spec.kv_groups)
            alike = (len(layers), units, groups, spec.embedding_bytes, spec.embedding_row_bytes)
            self._signature_of[layers] = self._signatures.setdefault(alike, len(self._signatures))
        return self._signature_of[layers]

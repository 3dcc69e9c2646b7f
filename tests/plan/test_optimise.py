"""The planner against brute force, on random small models, machines, budgets, jobs and pins."""

import dataclasses
import functools
import itertools
import math
import random
import re

import numpy as np
import pytest
from machines import steady
from plan.instances import PROCESS_BYTES, copying_instance_of, instance_of

from flexgen.base.quantities import GIB, MIB, parse_size
from flexgen.errors import CapacityError
from flexgen.options import TIERS, WEIGHT_HOMES, EngineOptions
from flexgen.plan.known.machines import find_machine, limits_of
from flexgen.plan.known.models import catalogue_spec
from flexgen.plan.model import KVGroupSpec
from flexgen.plan.play.simulate import simulate
from flexgen.plan.price.memory import footprint
from flexgen.plan.price.requests import RequestLoad
from flexgen.plan.search.evaluate import Bounds, Player
from flexgen.plan.search.optimise import Search
from flexgen.plan.search.point import Point
from flexgen.plan.search.shortage import shortage
from flexgen.plan.search.solve import solve, space_of
from flexgen.plan.search.space import Space
from flexgen.plan.search.steady import SteadyState
from flexgen.plan.tell.alternatives import pareto
from flexgen.plan.workload import Workload

TOLERANCE = 1.01
# Values per axis; kv_homes has its three kinds and what lies between.
COARSE = {"on_device": 3, "on_host": 5, "encoded": 3, "kv_homes": 3, "kv_disk": 4, "quota": 4, "cap": 2}
FINE = {"on_device": 5, "on_host": 7, "encoded": 4, "kv_homes": 5, "kv_disk": 5, "quota": 6, "cap": 3}


def solved(instance):
    problem = instance.options, instance.spec, instance.machine, instance.limits, instance.workload
    return solve(space_of(*problem, process_bytes=PROCESS_BYTES))


def grid_of(space, numbers, sizes):
    """All points of a grid, under every schedule and the first few sizes of micro-batches."""
    for schedule, tokens in itertools.product(space.schedules(), space.micro_batches()[:sizes]):
        free = space.free_axes(schedule)
        fixed = {"kv_homes": space.default_homes(), "quota": 1.0, "cap": 1.0}
        axes = [
            [step / (number - 1) for step in range(number)] if axis in free else [fixed.get(axis, 0.0)] for axis, number in numbers.items()
        ]
        choices = (True, False), space.host_attentions()
        for values, embedding, host_attention in itertools.product(itertools.product(*axes), *choices):
            where = dict(zip(numbers, values, strict=True))
            yield Point(
                **where, embedding=embedding, schedule=schedule, micro_batch_tokens=tokens, host_attention=host_attention
            )  # fmt: skip


def best_of_grid(instance, numbers, sizes, bounds=None):
    player = Player(instance.space())
    return min(player.score(point, bounds or Bounds()) for point in grid_of(player.space, numbers, sizes))


def ratio_to_grid(instance, numbers, sizes):
    """The objective of what `solve` finds over the best of a grid; None where nothing fits."""
    refused, _, least = best_of_grid(instance, numbers, sizes)
    if not math.isfinite(least):
        return None
    found = solved(instance)
    assert found.refused <= refused
    return found.objective / least if found.refused == refused else 0.0


@pytest.mark.matrix(5)
@pytest.mark.parametrize("seed", range(20))
def test_never_worse_than_a_grid(seed):
    ratio = ratio_to_grid(instance_of(seed), COARSE, 1)
    assert ratio is None or ratio <= TOLERANCE


@pytest.mark.matrix(4)
@pytest.mark.parametrize("seed", [*range(500, 512), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(512, 560))])
def test_never_worse_than_a_grid_beside_a_device(seed):
    """Where launches, decoding, and earlier KV on its way to prompts decide as well."""
    ratio = ratio_to_grid(copying_instance_of(seed), COARSE, 1)
    assert ratio is None or ratio <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20, 240))
def test_never_worse_than_a_fine_grid(seed):
    ratio = ratio_to_grid(instance_of(seed), FINE, 3)
    assert ratio is None or ratio <= TOLERANCE


@pytest.mark.parametrize(
    ("link", "host_rate", "on_host"), [(400e9, 10e9, False), (10e9, 100e9, True)], ids=["a fast link", "a fast processor"]
)
def test_next_tokens_are_attended_to_where_it_takes_less_time(make_spec, make_machine, make_limits, link, host_rate, on_host):
    """KV lives on the host, beside a device that holds the weights; the option has its way all the same."""
    groups = (KVGroupSpec(num_layers=8, bytes_per_token=4096, attention_flops_per_pair=4096.0),)
    spec = make_spec(layers=8, unit_bytes=MIB, groups=groups)
    machine = make_machine(
        device="cuda", device_bytes=4 * GIB, host_to_device=link, device_to_host=link, host_memory=2e12,
        dense={"bfloat16": [(16, 1e14), (1024, 1e14)]}, attention={"bfloat16": 1e14},
        decode_attention={"host": {"bfloat16": ((1.0, steady(host_rate)),)}, "device": {"bfloat16": ((1.0, steady(1e12)),)}},
    )  # fmt: skip
    limits = make_limits(device="cuda", host_bytes=8 * GIB, device_bytes=4 * GIB, device_total_bytes=4 * GIB)
    job = Workload(prompt_lens=(1024,) * 64, output_lens=(64,) * 64)

    def best(**options):
        pins = {"weights": "device=1", "kv": "host=1", "max_num_seqs": 64, "schedule": "zigzag", "micro_batch_tokens": 512}
        options = EngineOptions(dtype="bfloat16", **pins, **options)
        return solve(space_of(options, spec, machine, limits, job, process_bytes=PROCESS_BYTES))

    chosen = best()
    assert chosen.policy.host_attention == on_host
    assert (chosen.policy.kv_ring_bytes > 0) == (not on_host)
    pinned = {name: best(host_attention=name) for name in ("on", "off")}
    assert [each.policy.host_attention for each in pinned.values()] == [True, False]
    assert chosen.objective <= TOLERANCE * min(each.objective for each in pinned.values())
    assert max(each.seconds for each in pinned.values()) > 1.5 * chosen.seconds


# Jobs that are searched on a sample

# Where blocks are larger than the samples are at least, and smaller.
LARGE = {"on_device": 2, "on_host": 3, "encoded": 2, "kv_homes": 2, "kv_disk": 3, "quota": 3, "cap": 2}


def large_instance(seed):
    """A job of thousands of requests, and up to 30 times the budgets that its instance has for KV."""
    instance = instance_of(seed)
    draw = random.Random(seed)
    number = draw.choice([1500, 6000])
    places = [place % len(instance.workload) for place in range(number)]
    more = draw.choice([0, 10, 30]) * instance.spec.kv_bytes(max(map(sum, instance.workload.rows())))
    limits = dataclasses.replace(instance.limits, host_bytes=instance.limits.host_bytes + more)
    return dataclasses.replace(instance, workload=instance.workload.take(places), limits=limits)


@pytest.mark.parametrize("seed", [400, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(401, 416))])
def test_large_jobs_go_as_their_samples_say(seed):
    """The whole job takes about what the search expects, and no policy of a grid would take less."""
    instance = large_instance(seed)
    space = instance.space()
    if shortage(space):
        return
    player, found = Player(space), solved(instance)
    whole = player.whole(found.policy)
    assert whole.seconds == pytest.approx(found.seconds, rel=0.17)
    for policy in {space.policy(point) for point in grid_of(space, LARGE, 1)}:
        if policy is not None and (other := player.whole(policy)).refused <= whole.refused:
            assert whole.seconds <= 1.06 * other.seconds  # spilling has to gain 5 %, and the sample is not the job


def space_on_box(model, box, workload, **options):
    machine, spec = find_machine(box), catalogue_spec(model)
    options = EngineOptions(dtype=spec.dtype, **options)
    return Space(options, spec, machine, limits_of(machine, options), workload, int(1.5e9), TIERS)


def seconds_on_box(model, box, workload, **pins):
    """Of the best plan; infinite where none fits."""
    try:
        return Search(space_on_box(model, box, workload, **pins)).best(Bounds()).seconds
    except CapacityError:
        return math.inf


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "box", "output_len"),
    [
        ("llama-3-8b", "rtx3090-64gb", 128),
        ("opt-6.7b", "t4-gcp", 32),
        ("opt-6.7b", "a100-80gb-512gb", 128),
        ("llama-3-70b", "16gb-gpu-64gb", 128),
    ],
)
def test_freedom_costs_little_on_large_jobs(model, box, output_len):
    """Where policies take long to play, searches end because their effort is spent; fewer choices must not be much better."""
    seconds = functools.partial(seconds_on_box, model, box, Workload(prompt_lens=(512,) * 5000, output_lens=(output_len,) * 5000))
    pins = ("device=1", "host=1", "disk=1", "device=.75,host=.25", "device=.5,host=.5")
    assert seconds() <= 1.03 * min(seconds(weights=shares) for shares in pins)


@pytest.mark.parametrize(
    ("model", "box", "options", "widest"),
    [
        ("llama-3-8b", "rtx4090-64gb", {}, 1),
        ("qwen3-30b-a3b", "rtx4090-64gb", {}, 16),  # 8 of 128 experts
        ("llama-3-8b", "rtx4090-64gb", {"schedule": "row"}, 32),
    ],
)
def test_micro_batches_are_wide_enough(model, box, options, widest):
    sizes = space_on_box(model, box, Workload(prompt_lens=(512,), output_lens=(8,)), **options).micro_batches()
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == widest * 512
    assert sizes[-1] == 32


def test_experts_get_wide_micro_batches():
    workload = Workload(prompt_lens=(2000,) * 1000, output_lens=(10,) * 1000)
    seconds = functools.partial(seconds_on_box, "qwen3-30b-a3b", "rtx4090-64gb", workload)
    free = seconds()
    assert free <= 1.05 * min(seconds(micro_batch_tokens=tokens) for tokens in (1024, 2048, 4096))
    assert free <= 0.75 * seconds(micro_batch_tokens=512)


# The linear program


def steady_problem(seed):
    """(coefficients, room, most sequences, tiers of KV) of an instance; None where not even the bare minimum fits."""
    instance = instance_of(seed)
    options = dataclasses.replace(instance.options, weights=None, kv=None, micro_batch_tokens=None)
    space = dataclasses.replace(instance, options=options).space()
    if shortage(space):
        return None
    player = Player(space)
    point = next(grid_of(space, COARSE, 1))
    bare, room = space.free_memory(point, spills=bool(space.disk_bytes))
    return (
        SteadyState(player.expectation, RequestLoad.of(space.spec, space.workload).mean(), bare),
        room,
        len(space.workload),
        space.kv_tiers,
    )


def steady_solution(seed):
    """(the best steady state, and its problem); None where nothing fits."""
    problem = steady_problem(seed)
    found = problem and problem[0].best(problem[1], problem[2], kv_tiers=problem[3])
    return (found, *problem) if found else None


def simplex(steps, places):
    """All shares of so many homes in multiples of 1 / steps."""
    rows = [each for each in itertools.product(range(steps + 1), repeat=places) if sum(each) == steps]
    return np.array(rows) / steps


def rates_on_grid(state, room, most, kv_tiers, weight_shares, kv_shares, num_seqs):
    """Tokens/s for every combination, of shares of the state's homes and of TIERS; 0 where it does not fit."""
    homes, tiers = list(state.weights), list(state.kv)
    k = np.stack([kv_shares[:, TIERS.index(tier)] for tier in tiers], axis=1)
    kv_allowed = (kv_shares[:, [TIERS.index(t) for t in TIERS if t not in kv_tiers]] == 0).all(axis=1)
    seconds = state.fixed + (weight_shares @ np.stack([state.weights[home] for home in homes]))[:, None, None, :]
    seconds = seconds + num_seqs[:, None] * (k @ np.stack([state.kv[t] for t in tiers]))[None, :, None, :]
    fits = np.broadcast_to(kv_allowed[None, :, None], seconds.shape[:-1]).copy()
    for tier in TIERS:
        column = TIERS.index(tier)
        used = kv_shares[:, column] * room.kv_bytes + room.sequence_bytes.get(tier, 0.0)
        used = used + (room.staged * room.kv_bytes * kv_shares[:, 2] if tier == "host" else 0.0)
        sizes = [state.weight_bytes[home] * (WEIGHT_HOMES[home] == tier) if home != "disk" else 0.0 for home in homes]
        held = weight_shares @ np.array(sizes)
        fits &= held[:, None, None] + used[None, :, None] * num_seqs <= room.memory_bytes.get(tier, 0.0)
    return np.where(fits & (num_seqs <= most), num_seqs / seconds.max(axis=-1), 0.0)


@pytest.mark.parametrize("seed", range(30))
def test_the_linear_program_is_at_least_as_good_as_a_fine_grid(seed):
    problem = steady_problem(seed)
    if problem is None:
        return
    state, room, most, kv_tiers = problem
    found = state.best(room, most, kv_tiers=kv_tiers)
    num_seqs = np.unique(np.geomspace(1, most, 80))
    weights = simplex(20 if len(state.weights) < 4 else 10, len(state.weights))
    grid = rates_on_grid(state, room, most, kv_tiers, weights, simplex(10, 3), num_seqs).max()
    if found is None:
        assert grid == 0.0
        return
    assert grid <= found.tokens_per_s * (1 + 1e-6)
    # And what it claims is true: the same shares, priced and weighed as the grid's are.
    pairs = ((found.weights, state.weights), (found.kv, TIERS))
    shares = [np.array([[each.get(home, 0.0) for home in homes]]) for each, homes in pairs]
    shares = [np.where(each < 1e-9, 0.0, each) for each in shares]
    wider = dataclasses.replace(room, memory_bytes={tier: size * (1 + 1e-6) + 1 for tier, size in room.memory_bytes.items()})
    claimed = rates_on_grid(state, wider, most * (1 + 1e-9), kv_tiers, *shares, np.array([found.num_seqs]))
    assert claimed.item() == pytest.approx(found.tokens_per_s, rel=1e-5)


@pytest.mark.parametrize("seed", range(30))
def test_worth_is_the_gain_from_a_little_more_memory(seed):
    solved_problem = steady_solution(seed)
    if solved_problem is None:
        return
    found, state, room, most, kv_tiers = solved_problem

    def gain(tier, more):
        memory = {**room.memory_bytes, tier: room.memory_bytes[tier] + more}
        again = state.best(dataclasses.replace(room, memory_bytes=memory), most, kv_tiers=kv_tiers)
        return (again.tokens_per_s / found.tokens_per_s - 1) / more if again else None

    for tier, worth in found.worth.items():
        step = max(room.memory_bytes[tier] * 1e-4, 256.0)
        more, less = gain(tier, step), gain(tier, -step)
        # Where the optimum bends, the value at the margin lies between those of either side.
        assert more - 1e-12 <= worth * (1 + 2e-3) + 1e-12
        assert less is None or worth * (1 - 2e-3) - 1e-12 <= less + 1e-12


# Bounds on time


SEEDS = (1, 9, 13, 24, 25, 30, 45, 50)


@pytest.mark.matrix(1)
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("share", [0.3, 0.8])
def test_bounds_are_kept_at_the_least_cost(seed, share):
    instance = instance_of(seed)
    search = Search(instance.space())
    widest, shortest = search.best(Bounds()), search.shortest()
    bounds = Bounds(request_seconds=shortest.request_seconds + share * (widest.request_seconds - shortest.request_seconds) + 1e-9)
    options = dataclasses.replace(instance.options, max_request_seconds=bounds.request_seconds)
    found = solved(dataclasses.replace(instance, options=options))
    assert found.request_seconds <= bounds.request_seconds
    refused, excess, least = best_of_grid(instance, COARSE | {"cap": 5}, 1, bounds)
    assert (refused, excess) > (found.refused, 0.0) or found.objective <= TOLERANCE * least


@pytest.mark.parametrize("name", ["max_request_seconds", "max_job_seconds"])
def test_bounds_that_nothing_keeps_are_refused_with_what_there_is(name):
    instance = instance_of(1)
    options = dataclasses.replace(instance.options, **{name: 1e-6})
    with pytest.raises(
        CapacityError,
        match=rf"no plan keeps {name}=1e-06: the one that comes nearest takes .* and .* for the job",
    ):
        solved(dataclasses.replace(instance, options=options))


def test_the_job_bound_is_kept():
    instance = instance_of(1)
    free = solved(instance)
    options = dataclasses.replace(instance.options, max_job_seconds=free.seconds * 1.02)
    assert solved(dataclasses.replace(instance, options=options)).seconds <= free.seconds * 1.02


@pytest.mark.matrix(1)
@pytest.mark.parametrize("seed", SEEDS)
def test_the_curve_rises_from_short_requests_to_throughput(seed):
    space = instance_of(seed).space()
    curve = pareto(space)
    assert len(curve) > (len(space.workload) > 1), "one request has nothing to trade its time for"
    for one, other in itertools.pairwise(curve):
        assert one.request_seconds < other.request_seconds
        assert one.tokens_per_s < other.tokens_per_s
    best = Search(space).best(Bounds())
    assert curve[-1].tokens_per_s >= space.workload.output_tokens / best.seconds / TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.1, 0.5])
def test_more_effort_finds_little_more_under_bounds_on_large_jobs(share):
    """A job whose policies take long to play, where searches end because their effort is spent."""
    workload = Workload(prompt_lens=(512,) * 2000, output_lens=(128,) * 2000)
    space = space_on_box("llama-3-70b", "16gb-gpu-64gb", workload)
    search = Search(space)
    widest, shortest = search.best(Bounds()), search.shortest()
    asked = shortest.request_seconds + share * (widest.request_seconds - shortest.request_seconds)
    usual = Search(space).best(Bounds(request_seconds=asked))
    assert usual.seconds <= 1.03 * Search(space, patience=6).best(Bounds(request_seconds=asked)).seconds


# Pins and budgets


@pytest.mark.matrix(4)
@pytest.mark.parametrize("seed", range(300, 312))
def test_pins_stay_and_budgets_hold(seed):
    instance = instance_of(seed)
    try:
        found = solved(instance)
    except CapacityError:
        return
    policy, options = found.policy, instance.options
    space = instance.space()
    for pinned, kept in ((space.weights, policy.weights), (space.kv, policy.kv)):
        assert pinned is None or pinned == kept
    for name in ("max_num_seqs", "micro_batch_tokens", "prefill_tokens"):
        assert getattr(options, name) in (None, getattr(policy, name))
    assert options.schedule in ("auto", policy.schedule)
    used = footprint(policy, instance.spec, instance.limits, process_bytes=PROCESS_BYTES)
    for tier, parts in used.items():
        assert sum(parts.values()) <= getattr(instance.limits, f"{tier}_bytes")
        assert min(parts.values()) >= 0
    for tier, held in simulate(instance.spec, policy, instance.workload).kv_bytes.items():
        assert held.max(initial=0) <= getattr(policy, f"kv_{tier}_bytes")
    numbers = [*dataclasses.asdict(policy).values(), *dataclasses.asdict(policy.weights).values(), *dataclasses.asdict(policy.kv).values()]
    assert {type(each) for each in numbers} <= {int, float, str, bool, dict, type(None)}


@pytest.mark.matrix(16)
@pytest.mark.parametrize("seed", range(400, 480))
def test_the_smallest_change_makes_it_fit(seed):
    """Budgets cut below the least: exactly what the message asks for is enough, and 2 MiB less is not."""
    instance = instance_of(seed)
    draw = random.Random(seed)
    cut = {"host_bytes": PROCESS_BYTES + draw.randrange(60) * MIB, "disk_bytes": draw.choice([0, 1000, 100 * GIB])}
    cut["device_bytes"] = min(instance.limits.device_bytes, draw.randrange(9) * MIB)
    kv = draw.choice([None, "host=1", "host=.3,disk=.7", "disk=1"])
    limits = dataclasses.replace(instance.limits, **cut, offload_in_memory=draw.random() < 0.2)
    instance = dataclasses.replace(instance, limits=limits, options=dataclasses.replace(instance.options, kv=kv))
    said = shortage(instance.space())
    asked = {
        f"{option.removesuffix('_mem')}_bytes": parse_size(size)
        for option, size in re.findall(r"raise (host_mem|device_mem|disk)=? to ([\d.]+GiB)", said)
    }
    if asked:
        with pytest.raises(CapacityError, match="GiB are missing"):
            solved(instance)
    solved(dataclasses.replace(instance, limits=dataclasses.replace(limits, **asked)))
    for name, size in asked.items():
        short = dataclasses.replace(limits, **(asked | {name: max(size - 2 * MIB, 0)}))
        with pytest.raises(CapacityError):
            solved(dataclasses.replace(instance, limits=short))

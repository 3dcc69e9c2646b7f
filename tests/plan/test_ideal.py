"""T* is a bound: no policy that plays a job within its budgets has a smaller ideal time."""

import dataclasses
import itertools
import math
import random
import statistics

import pytest
from plan.instances import PROCESS_BYTES, instance_of
from plan.test_space import random_points

from flexgen.base.quantities import GIB
from flexgen.plan.play.simulate import simulate
from flexgen.plan.policy import Fractions
from flexgen.plan.price.weights import unit_homes
from flexgen.plan.search.evaluate import Bounds
from flexgen.plan.search.ideal import Budgets, budgets_of, least_ideal_seconds
from flexgen.plan.search.optimise import Search
from flexgen.plan.search.solve import space_of
from flexgen.plan.workload import Workload


def jobs(lengths):
    return Workload(prompt_lens=tuple(s for s, _ in lengths), output_lens=tuple(n for _, n in lengths))


def least_of(instance):
    budgets = budgets_of(instance.limits, instance.spec, PROCESS_BYTES)
    return least_ideal_seconds(instance.spec, instance.machine, instance.workload, budgets, "bfloat16")


def played_ideals(instance, number, seed):
    """Ideal seconds of policies drawn at random from the space of an instance, of those that serve every request."""
    space = instance.space()
    policies = {space.policy(point) for point in random_points(space, random.Random(seed), number)} - {None}
    for played in (simulate(instance.spec, policy, instance.workload) for policy in policies):
        if not played.num_refused:
            yield played.busiest_seconds(instance.machine, "bfloat16")


def with_common_prompts(instance, seed):
    """The instance with prompts of which later requests find a part computed."""
    draw, job = random.Random(seed), instance.workload
    found = [draw.choice([0, draw.randrange(length)]) if place else 0 for place, length in enumerate(job.prompt_lens)]
    return dataclasses.replace(instance, workload=dataclasses.replace(job, shared_lens=tuple(found)))


def with_scores(instance, seed):
    """The instance with prompts that are scored, many of them only scored."""
    draw, job = random.Random(seed), instance.workload
    outputs = tuple(most * draw.choice([0, 0, 1]) for most in job.output_lens)
    scored = tuple(draw.choice([0, draw.randint(1, length)]) for length in job.prompt_lens)
    return dataclasses.replace(instance, workload=dataclasses.replace(job, output_lens=outputs, scored_lens=scored))


@pytest.mark.parametrize("seed", range(60))
def test_no_played_policy_is_below_the_bound(seed):
    for instance in (instance_of(seed), with_common_prompts(instance_of(seed), seed)):
        assert least_of(instance) <= min(played_ideals(instance, 60, seed), default=math.inf)


@pytest.mark.parametrize("seed", range(0, 60, 3))
def test_no_played_policy_is_below_the_bound_where_prompts_are_scored(seed):
    instance = with_scores(instance_of(seed), seed)
    for each in (instance, with_common_prompts(instance, seed)):
        assert least_of(each) <= min(played_ideals(each, 60, seed), default=math.inf)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(60, 400))
def test_no_played_policy_is_below_the_bound_of_many_more(seed):
    for instance in (instance_of(seed), with_common_prompts(instance_of(seed), seed), with_scores(instance_of(seed), seed)):
        assert least_of(instance) <= min(played_ideals(instance, 300, seed), default=math.inf)


def test_the_bound_is_tight_where_little_memory_goes_elsewhere():
    """The best of a few random policies is within 15 % of the bound for half of the problems: pages, rings and workspace included."""
    ratios = [
        least_of(instance_of(seed)) / best for seed in range(40) if (best := min(played_ideals(instance_of(seed), 60, seed), default=0))
    ]
    assert statistics.median(ratios) > 0.85


def test_requests_of_very_many_lengths_are_bounded_too(llama_3b, make_machine, make_policy):
    """More different requests than the program tells apart, against their policies and against the same job in two halves."""
    draw, machine = random.Random(5), make_machine()
    workload = jobs([(draw.randrange(20, 900), draw.randrange(2, 90)) for _ in range(300)])
    budgets = Budgets(device="cpu", host_bytes=3 * GIB, disk_bytes=100 * GIB)
    least = least_ideal_seconds(llama_3b, machine, workload, budgets, "bfloat16")
    for policy in allowed_policies(random.Random(7), llama_3b, budgets, workload, make_policy, 30):
        played = simulate(llama_3b, policy, workload)
        if not played.num_refused:
            assert least <= played.busiest_seconds(machine, "bfloat16")
    total = simulate(llama_3b, make_policy(), workload).total()
    assert least >= (total.dense_flops / 8e11 + total.attention_flops / 5e10) * (1 - 1e-6)


def test_budgets_that_hold_nothing_have_no_policy(make_spec, make_machine):
    assert least_ideal_seconds(make_spec(), make_machine(), jobs([(10, 5)]), Budgets(device="cpu", host_bytes=0), "bfloat16") == math.inf


def allowed_policies(draw, spec, budgets, workload, make_policy, count):
    """Policies drawn at random within the budgets, every byte of memory used."""
    while count:
        host = draw.random()
        weights = Fractions(host=host, disk=1 - host)
        homes = unit_homes(spec, weights)
        held = sum(unit.decoded_bytes for unit, home in zip(spec.units, homes, strict=True) if home == "host")
        if held > budgets.host_bytes:
            continue
        count -= 1
        room = budgets.host_bytes - held
        yield make_policy(
            weights=weights,
            embedding_resident=False,
            kv_host_bytes=room,
            kv_disk_bytes=room if budgets.disk_bytes else 0,
            kv=Fractions(host=0.5, disk=0.5) if budgets.disk_bytes else Fractions(host=1.0),
            schedule=draw.choice(["diagonal", "zigzag", "row"]),
            prefill_tokens=draw.choice([200, 512, 1024, 4096, 1 << 20]),
            max_num_seqs=draw.choice([4, 20, 60, len(workload)]),
            micro_batch_tokens=2048,
            page_tokens=draw.choice([1, 16, 64]),
        )


@pytest.mark.parametrize("disk_bytes", [0, 100 * GIB])
@pytest.mark.parametrize("lengths", [[(256, 32)] * 96, [(64, 64), (400, 16), (128, 100)] * 30], ids=["equal", "mixed"])
def test_no_policy_within_the_budgets_is_faster_than_the_least(llama_3b, make_machine, make_policy, lengths, disk_bytes):
    workload, machine = jobs(lengths), make_machine()
    budgets = Budgets(device="cpu", host_bytes=3 * GIB, disk_bytes=disk_bytes)
    least = least_ideal_seconds(llama_3b, machine, workload, budgets, "bfloat16")
    for policy in allowed_policies(random.Random(7), llama_3b, budgets, workload, make_policy, 60):
        played = simulate(llama_3b, policy, workload)
        if not played.num_refused:
            assert least <= played.busiest_seconds(machine, "bfloat16")
    # And it is no fantasy: everything must be computed, and a pass cannot read less than what never fits.
    total = simulate(llama_3b, make_policy(), workload).total()
    assert least >= (total.dense_flops / 8e11 + total.attention_flops / 5e10) * (1 - 1e-6)
    assert least >= max(workload.output_lens) * (llama_3b.streamed_bytes - 3 * GIB) / 2e9


def test_scores_are_work(llama_3b, make_machine):
    """Two prompts, with the head at all positions or at the last one."""
    budgets = Budgets(device="cpu", host_bytes=20 * GIB)

    def least(**scores):
        job = Workload(prompt_lens=(256,) * 2, output_lens=(0,) * 2, **scores)
        return least_ideal_seconds(llama_3b, make_machine(), job, budgets, "bfloat16")

    assert least(scored_lens=(256,) * 2) - least(scored_lens=(1,) * 2) == pytest.approx(
        2 * 255 * llama_3b.head_flops_per_token / 8e11, rel=1e-4
    )


def test_the_least_is_the_computing_where_everything_fits(llama_3b, make_machine, make_policy):
    workload = jobs([(256, 32)] * 20)
    least = least_ideal_seconds(llama_3b, make_machine(), workload, Budgets(device="cpu", host_bytes=20 * GIB), "bfloat16")
    total = simulate(llama_3b, make_policy(), workload).total()
    assert least == pytest.approx(total.dense_flops / 8e11 + total.attention_flops / 5e10)


@pytest.mark.parametrize("device", ["cpu", "sim"])
def test_more_memory_is_never_worse(llama_3b, make_machine, device):
    workload = jobs([(256, 32)] * 64)

    def least(scale):
        budgets = Budgets(device=device, host_bytes=int(scale * GIB), device_bytes=0 if device == "cpu" else int(scale * GIB))
        return least_ideal_seconds(llama_3b, make_machine(), workload, budgets, "bfloat16")

    seconds = [least(scale) for scale in (1, 2, 4, 8)]
    assert all(more <= less * 1.005 for less, more in itertools.pairwise(seconds))


@pytest.mark.matrix(2)
@pytest.mark.parametrize("seed", range(6))
def test_the_plan_is_never_better_than_the_least(llama_3b, make_machine, make_limits, make_options, process_bytes, seed):
    draw = random.Random(seed)
    limits = make_limits(host_bytes=int(draw.uniform(1, 9) * GIB))
    job = jobs([(draw.randrange(20, 600), draw.randrange(4, 80)) for _ in range(60)])
    space = space_of(make_options(), llama_3b, make_machine(), limits, job, process_bytes=process_bytes)
    policy = Search(space).best(Bounds()).policy
    least = least_ideal_seconds(llama_3b, make_machine(), job, budgets_of(limits, llama_3b, process_bytes), "bfloat16")
    assert least <= simulate(llama_3b, policy, job).busiest_seconds(make_machine(), "bfloat16")

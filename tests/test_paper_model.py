"""The paper's model: its equations by hand, its search by brute force, its published figures."""

import dataclasses
import itertools
import math

import numpy as np
import pytest

from benchmarks.paper.case import PaperCase, PaperMachine, PaperModel, PaperPolicy, PaperWorkload
from benchmarks.paper.memory import held_bytes, peak_bytes
from benchmarks.paper.price import block_seconds, decode_seconds, layer_seconds, overlapped, prefill_seconds, throughput
from benchmarks.paper.published import OPT, POLICIES, RELEASED, T4_FITTED, T4_PRINTED, TEXT, WORKLOAD
from benchmarks.paper.search import PLACED, best_policy, solve_fractions
from flexgen.base.quantities import GIB
from flexgen.errors import OptionError
from flexgen.options import TIERS
from flexgen.plan.policy import Fractions

TINY = PaperModel(name="tiny", num_hidden_layers=2, hidden_size=4, intermediate_size=8, num_attention_heads=2)
SHORT = PaperWorkload(prompt_len=3, output_len=4)
MIXED = PaperPolicy(
    gpu_batch_size=2,
    num_gpu_batches=2,
    weights=Fractions(device=0.25, host=0.5, disk=0.25),
    kv=Fractions(device=0.5, host=0.25, disk=0.25),
    activations=Fractions(device=0.0, host=0.5, disk=0.5),
)
# Every rate another, and all powers of two, so that the sums below are done by hand.
SIMPLE = PaperMachine(
    name="simple",
    device_bytes=2000,
    host_bytes=1000,
    disk_bytes=1000,
    host_to_device_bytes_per_s=2,
    kv_to_host_bytes_per_s=4,
    activations_to_host_bytes_per_s=8,
    disk_read_bytes_per_s=16,
    decode_weights_read_bytes_per_s=32,
    kv_to_disk_bytes_per_s=2,
    activations_to_disk_bytes_per_s=4,
    decode_write_bytes_per_s=8,
    prefill_flops=1024,
    decode_flops=512,
    prefill_attention_flops=64,
    decode_attention_flops=32,
    host_attention_flops=16,
    host_slowdown=(0.0, 0.0, 0.0),
)


def case_of(variant, *, machine=SIMPLE, model=TINY, workload=SHORT):
    return PaperCase(machine=machine, model=model, workload=workload, variant=variant)


def t4_case(name, variant, machine=T4_FITTED):
    return case_of(variant, machine=machine, model=OPT[name], workload=WORKLOAD)


def test_terms_by_hand():
    assert TINY.layer_bytes == TINY.layer_flops_per_token == 256
    assert prefill_seconds(case_of(TEXT), MIXED) == {
        "host_to_device": (0.75 * 256 + 96) / 2,
        "device_to_host": 0.5 * 256 / 4 + 96 / 8,
        "disk_read": (0.25 * 256 + 0.5 * 96) / 16,
        "disk_write": 0.25 * 256 / 2 + 0.5 * 96 / 4,
        "compute": 4 * 3 * 256 / 1024 + 576 / 64,
    }
    assert decode_seconds(case_of(TEXT), MIXED) == {
        "host_to_device": (0.75 * 256 + 32) / 2,
        "device_to_host": 32 / 8,
        "disk_read": (80 + 0.5 * 32) / 16 + 0.25 * 256 / 32,
        "disk_write": (16 + 16) / 8,
        "compute": 4 * 256 / 512 + 0.5 * 320 / 32 + 0.5 * 320 / 16,
    }


def test_the_text_overlaps_everything_the_code_does_not():
    assert layer_seconds(case_of(TEXT), MIXED) == (144, 112)
    assert layer_seconds(case_of(RELEASED), MIXED) == (144 + 7, 112 + 17)
    assert block_seconds(case_of(TEXT), MIXED) == (144 + 3 * 112) * 2
    assert throughput(case_of(RELEASED), MIXED) == pytest.approx(4 * 4 / ((151 + 3 * 129) * 2))


def test_peaks_by_hand():
    assert peak_bytes(case_of(TEXT), MIXED) == {"device": 576 + 432 + 192, "host": 528 + 240, "disk": 400}
    assert peak_bytes(case_of(RELEASED), MIXED) == {"device": 576 + 432 + 600, "host": 496 + 264, "disk": 400}


def test_scratch_of_decode_by_hand():
    text, released = (held_bytes(case_of(variant), MIXED)["device"] for variant in (TEXT, RELEASED))
    assert text[4:] == tuple(976 + stage for stage in (64, 92, 32, 48))
    assert released[1:] == (976 + 144 + 268,)


def test_the_host_attends_slower_to_small_batches_of_small_models():
    machine = dataclasses.replace(SIMPLE, host_slowdown=(0.01, 0.03, 0.05))
    assert machine.host_flops(64, 4096) == machine.host_flops(128, 8192) == 16
    assert machine.host_flops(16, 1024) == pytest.approx(16 * (1 + 0.01 * 2 * 2 - 0.03 * 2 - 0.05 * 2))
    assert dataclasses.replace(machine, host_slowdown=(0.0, 1.0, 1.0)).host_flops(1, 1024) == pytest.approx(1.6)


def test_published_policies_are_percent():
    assert POLICIES["opt-175b"].weights == Fractions(device=0.0, host=0.5, disk=0.5)
    assert POLICIES["opt-30b"].num_sequences == 144


def test_fractions_that_do_not_add_up_are_refused():
    with pytest.raises(OptionError, match=r"kv add up to 0\.5"):
        throughput(case_of(TEXT), dataclasses.replace(MIXED, kv=Fractions(host=0.5)))


# What the released code itself prints, run with its own solver on capacities of 16, 200 and 1500 GiB: see docs/paper_model.md.
@pytest.mark.parametrize(("name", "tokens_per_s"), [("opt-30b", 7.14), ("opt-175b", 0.15), ("opt-6.7b", 60.85)])
def test_published_policies_cost_what_the_released_code_says(name, tokens_per_s):
    assert throughput(t4_case(name, RELEASED), POLICIES[name]) == pytest.approx(tokens_per_s, abs=0.005)


def test_the_published_30b_policy_does_not_fit_by_the_released_code():
    peak = peak_bytes(t4_case("opt-30b", RELEASED), POLICIES["opt-30b"])
    assert peak["device"] / GIB == pytest.approx(18.8, abs=0.05)


def test_the_search_finds_what_the_released_code_finds_for_30b():
    case = t4_case("opt-30b", RELEASED)
    found = best_policy(case)
    assert (found.gpu_batch_size, found.num_gpu_batches) == (32, 5)
    assert throughput(case, found) == pytest.approx(7.09, abs=0.005)
    assert found.weights.device == pytest.approx(0.12, abs=0.005)


def test_the_search_finds_what_the_released_code_finds_for_175b():
    case = t4_case("opt-175b", RELEASED)
    found = best_policy(case)
    assert (found.gpu_batch_size, found.num_gpu_batches) == (1, 432)
    assert throughput(case, found) == pytest.approx(0.17, abs=0.005)


def test_the_search_obeys_its_variant():
    case = t4_case("opt-175b", TEXT, T4_PRINTED)
    found = best_policy(case)
    assert found.num_gpu_batches <= 20
    assert found.gpu_batch_size % 4 == 0
    assert throughput(case, found) >= throughput(case, POLICIES["opt-175b"])
    assert found.activations.disk > 0
    assert solve_fractions(dataclasses.replace(case, variant=RELEASED), 4, 4).activations.disk == 0


def test_a_machine_without_disk_holds_what_its_memory_holds():
    without_disk = dataclasses.replace(T4_FITTED, disk_bytes=0)
    assert solve_fractions(t4_case("opt-30b", TEXT, without_disk), 32, 2).kv.disk == 0
    assert solve_fractions(t4_case("opt-175b", TEXT, without_disk), 1, 1) is None


def test_nothing_fits_a_machine_without_room():
    case = case_of(TEXT, machine=dataclasses.replace(SIMPLE, disk_bytes=0, host_bytes=100, device_bytes=100))
    assert best_policy(case) is None


def simplex(steps):
    """Every triple of fractions in `steps` steps, as (tiers, points)."""
    return np.array([p for p in itertools.product(range(steps + 1), repeat=3) if sum(p) == steps], dtype=float).T / steps


def every_placement(bare, steps):
    """One policy whose fractions are arrays: all combinations of the three triples."""
    points = simplex(steps)
    chosen = np.array(list(itertools.product(range(points.shape[1]), repeat=len(PLACED)))).T
    placed = {what: Fractions(**dict(zip(TIERS, points[:, index], strict=True))) for what, index in zip(PLACED, chosen, strict=True)}
    return dataclasses.replace(bare, **placed)


def grid_seconds(case, policy):
    """Seconds of a block at every point of the grid, infinite where it does not fit."""
    prefill, decode = (
        np.maximum.reduce(np.broadcast_arrays(*overlapped(terms(case, policy), overlap)))
        for terms, overlap in ((prefill_seconds, case.variant.prefill_overlap), (decode_seconds, case.variant.decode_overlap))
    )
    seconds = (prefill + decode * (case.workload.output_len - 1)) * case.model.num_hidden_layers
    for tier, capacity in case.capacities().items():
        for moment in held_bytes(case, policy)[tier]:
            seconds = np.where(moment <= capacity, seconds, np.inf)
    return np.where(policy.activations.disk > 0, np.inf, seconds) if not case.variant.activations_on_disk else seconds


def random_case(variant, seed):
    """Rates over orders of magnitude; answers so short that the phases compete; tiers that hold a tenth of all or everything."""
    rng = np.random.default_rng(seed)
    hidden = int(rng.choice([64, 512, 4096]))
    model = PaperModel(
        name="random", num_hidden_layers=int(rng.integers(2, 40)), hidden_size=hidden, intermediate_size=4 * hidden, num_attention_heads=8
    )
    workload = PaperWorkload(prompt_len=int(rng.integers(8, 600)), output_len=int(rng.choice([2, 3, 5, 50])))
    rates = {
        field.name: float(10 ** (rng.uniform(12, 15) if "flops" in field.name else rng.uniform(8.5, 10.5)))
        for field in dataclasses.fields(PaperMachine)
        if field.name.endswith(("per_s", "flops"))
    }
    machine = dataclasses.replace(T4_FITTED, **rates)
    batches = (int(rng.choice([1, 4, 32])), int(rng.integers(1, 6)))
    bare = PaperPolicy(gpu_batch_size=batches[0], num_gpu_batches=batches[1], weights=Fractions(), kv=Fractions(), activations=Fractions())
    everything = {}
    for tier in TIERS:
        whole = Fractions(**{tier: 1.0})
        at_home = dataclasses.replace(bare, weights=whole, kv=whole, activations=whole)
        everything[f"{tier}_bytes"] = peak_bytes(case_of(variant, machine=machine, model=model, workload=workload), at_home)[tier]
    shares = dict(zip(everything, (rng.uniform(0.1, 0.8), rng.uniform(0.1, 1.0), rng.uniform(0.4, 1.3)), strict=True))
    machine = dataclasses.replace(machine, **{name: size * shares[name] for name, size in everything.items()})
    return case_of(variant, machine=machine, model=model, workload=workload), bare


@pytest.mark.parametrize("variant", [TEXT, RELEASED], ids=lambda variant: variant.name)
def test_the_linear_program_is_never_worse_than_a_grid(variant):
    solved = 0
    for seed in range(40):
        case, bare = random_case(variant, seed)
        best = float(grid_seconds(case, every_placement(bare, steps=5)).min())
        found = solve_fractions(case, bare.gpu_batch_size, bare.num_gpu_batches)
        if found is None:
            assert best == math.inf, seed
            continue
        assert block_seconds(case, found) <= best * (1 + 1e-5), seed
        for tier, capacity in case.capacities().items():
            assert peak_bytes(case, found)[tier] <= capacity * (1 + 1e-6), (seed, tier)
        solved += math.isfinite(best)
    assert solved >= 20


def neighbours(policy, rng, number=3000):
    """One policy whose fractions are arrays: placements a little beside it, up to a tenth moved, that still add up to 1."""
    placed = {}
    for what in PLACED:
        here = np.array([getattr(getattr(policy, what), tier) for tier in TIERS])
        towards = rng.dirichlet(np.full(len(TIERS), 0.3), size=number)
        near = here + (towards - here) * 10 ** rng.uniform(-4, -1, size=(number, 1)) * rng.integers(0, 2, size=(number, 1))
        placed[what] = Fractions(**dict(zip(TIERS, near.T, strict=True)))
    return dataclasses.replace(policy, **placed)


@pytest.mark.parametrize("variant", [TEXT, RELEASED], ids=lambda variant: variant.name)
def test_no_neighbour_of_the_solution_is_faster(variant):
    """The program is convex, so what nothing near improves is the best there is, between the points of any grid too."""
    rng = np.random.default_rng(0)
    compared = 0
    for seed in range(40):
        case, bare = random_case(variant, seed)
        found = solve_fractions(case, bare.gpu_batch_size, bare.num_gpu_batches)
        if found is None:
            continue
        seconds = grid_seconds(case, neighbours(found, rng))
        assert seconds.min() >= block_seconds(case, found) * (1 - 1e-5), seed
        compared += bool(np.isfinite(seconds).any())
    assert compared >= 20

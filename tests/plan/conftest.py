"""Values that the planner's tests vary: each fixture is a function that takes what differs from a small default."""

import pytest
from machines import machine_of

from flexgen.base.quantities import GIB, MIB
from flexgen.options import EngineOptions
from flexgen.plan.machine import Limits
from flexgen.plan.model import KVGroupSpec, ModelSpec, UnitSpec
from flexgen.plan.policy import Fractions, Policy


def spec_of(*, layers=3, unit_bytes=1000, decoded=1, groups=None, **changes):
    """`layers` units of `unit_bytes` and a head; one KV group of 10 bytes a token and layer."""
    units = [
        UnitSpec(name=f"layers.{number}", disk_bytes=unit_bytes, decoded_bytes=unit_bytes * decoded, flops_per_token=2.0 * unit_bytes)
        for number in range(layers)
    ]
    units.append(UnitSpec(name="head", disk_bytes=unit_bytes, decoded_bytes=unit_bytes * decoded, flops_per_token=500.0, head=True))
    values = {
        "name": "tiny",
        "model_type": "llama",
        "units": tuple(units),
        "kv_groups": groups or (KVGroupSpec(num_layers=layers, bytes_per_token=10, attention_flops_per_pair=4.0),),
        "resident_bytes": 64,
        "embedding_bytes": 4096,
        "embedding_row_bytes": 16,
        "hidden_size": 8,
        "intermediate_size": 16,
        "vocab_size": 32,
        "max_position_embeddings": 4096,
    }
    return ModelSpec(**(values | changes))


def llama_3b_spec():
    """The shape of Llama-3.2-3B in bfloat16: 6.4 GB, head tied to the embedding."""
    hidden, intermediate, vocabulary = 3072, 8192, 128256
    units = []
    for layer in range(28):
        attention = 2 * hidden * hidden + 2 * hidden * 1024
        for name, size in (("attn", attention), *((each, hidden * intermediate) for each in ("gate", "up", "down"))):
            units.append(UnitSpec(name=f"layers.{layer}.{name}", disk_bytes=2 * size, decoded_bytes=2 * size, flops_per_token=2.0 * size))
    rows = hidden * vocabulary // 12
    units += [
        UnitSpec(name=f"head.{part}", disk_bytes=2 * rows, decoded_bytes=2 * rows, flops_per_token=2.0 * rows, head=True)
        for part in range(12)
    ]
    return ModelSpec(
        name="llama-3b",
        model_type="llama",
        units=tuple(units),
        kv_groups=(KVGroupSpec(num_layers=28, bytes_per_token=4096, attention_flops_per_pair=4.0 * hidden),),
        resident_bytes=57 * hidden * 2,
        embedding_bytes=0,
        embedding_row_bytes=8192,
        hidden_size=hidden,
        intermediate_size=intermediate,
        vocab_size=vocabulary,
        max_position_embeddings=131072,
    )


def policy_of(**changes):
    values = {
        "device": "cpu",
        "dtype": "bfloat16",
        "weights": Fractions(disk=1.0),
        "kv": Fractions(host=1.0),
        "kv_device_bytes": 0,
        "kv_host_bytes": 1 << 30,
        "kv_disk_bytes": 0,
        "host_ring_bytes": 0,
        "device_ring_bytes": 0,
        "workspace_bytes": 0,
        "embedding_resident": True,
        "schedule": "diagonal",
        "max_num_seqs": 1000,
        "prefill_tokens": 1 << 30,
        "micro_batch_tokens": 512,
        "page_tokens": 1,
        "compute_threads": 2,
        "io_threads": 2,
    }
    return Policy(**(values | changes))


def limits_of(**changes):
    values = {
        "device": "cpu",
        "host_bytes": 4 * GIB,
        "host_source": "test",
        "host_total_bytes": 24 * GIB,
        "host_total_source": "physical memory",
        "device_bytes": 0,
        "device_total_bytes": 0,
        "disk_bytes": 0,
        "disk_total_bytes": 100 * GIB,
        "offload_dir": "/tmp",
        "offload_in_memory": False,
    }
    return Limits(**(values | changes))


def options_of(**changes):
    return EngineOptions(**({"dtype": "bfloat16"} | changes))


@pytest.fixture(scope="module", autouse=True)
def hasty_plans():
    """These tests search with all of the usual effort."""


@pytest.fixture(scope="session")
def make_spec():
    return spec_of


@pytest.fixture(scope="session")
def llama_3b():
    return llama_3b_spec()


@pytest.fixture(scope="session")
def make_machine():
    return machine_of


@pytest.fixture(scope="session")
def make_policy():
    return policy_of


@pytest.fixture(scope="session")
def make_limits():
    return limits_of


@pytest.fixture(scope="session")
def make_options():
    return options_of


@pytest.fixture(scope="session")
def process_bytes():
    return 450 * MIB

"""Options that have no meaning together are refused, never ignored."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flexgen.errors import OptionError
from flexgen.formats import flexgen_v0
from flexgen.options import PAPER_FORMAT, EngineOptions

FIELDS = [field.name for field in dataclasses.fields(EngineOptions)]
# What programs pass by mistake, as it appears in messages.
MISTAKES: dict[str, Any] = {
    "None": None, "nan": float("nan"), "''": "", "[]": [], "-1": -1, "10000000": 10**400, "a value of type int": 10**5000,
    "<object": object(), "{'a': None}": {"a": None}, "True": True, "array": np.zeros(2),
}  # fmt: skip
MEANT = {  # those that mean something
    "None": {
        "device_mem", "host_mem", "disk", "offload_dir", "weights", "kv", "sparse_attention", "max_num_seqs", "micro_batch_tokens",
        "prefill_tokens", "max_request_seconds", "max_job_seconds", "allow_formats", "max_model_len", "revision", "trace",
        "stages", "devices", "interface", "trace_passes",
    },
    "[]": {"allow_formats"}, "-1": {"max_logprobs", "seed"}, "True": {"overlap", "prefix_sharing", "verify_reads"},
}  # fmt: skip


@pytest.mark.parametrize("value", MISTAKES)
@pytest.mark.parametrize("name", FIELDS)
def test_every_value_is_accepted_or_refused_by_the_name_of_the_option(name: str, value: str) -> None:
    if name in MEANT.get(value, ()):
        EngineOptions(**{name: MISTAKES[value]})
        return
    with pytest.raises(OptionError) as caught:
        EngineOptions(**{name: MISTAKES[value]})
    said = str(caught.value)
    assert re.match(rf"{name}(=| must be |: )", said)
    assert value in said or (name, value) in (("trust_remote_code", "True"), ("allow_formats", "array"))  # which names an item
    assert len(said) < 300


def test_formats_may_be_a_list_or_a_text() -> None:
    for given in ("k8v4,int4", ["int4", "k8v4"], ("int4,k8v4",), ["int4", " k8v4 ", "int4"], np.array(["int4", "k8v4"])):
        assert EngineOptions(allow_formats=given).allow_formats == "int4,k8v4"
    assert EngineOptions(allow_formats=[]).allow_formats is None
    with pytest.raises(OptionError, match="allow_formats: 'int5' is unknown; known: int8, int4, kv-int8"):
        EngineOptions(allow_formats=["int4", "int5"])


def test_a_folder_may_be_a_path(tmp_path: Path) -> None:
    assert EngineOptions(offload_dir=tmp_path) == EngineOptions(offload_dir=str(tmp_path))
    with pytest.raises(OptionError, match="offload_dir must be the path of a folder"):
        EngineOptions(offload_dir="a\0b")


def test_the_papers_format_is_not_unknown() -> None:
    assert PAPER_FORMAT == flexgen_v0.NAME
    with pytest.raises(OptionError, match=r"weight_format='flexgen-v0' is for comparisons.*`flexgen convert --weight-format flexgen-v0`"):
        EngineOptions(weight_format="flexgen-v0")


@pytest.mark.parametrize("schedule", ["zigzag", "row"])
def test_a_quota_is_for_the_diagonal_schedule(schedule: str) -> None:
    with pytest.raises(OptionError, match="prefill_tokens"):
        EngineOptions(schedule=schedule, prefill_tokens=100)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"host_mem": "10"}, "did you mean 10GiB"),
        ({"host_mem": "16000"}, "did you mean 16000MiB"),
        ({"host_mem": "10K"}, "did you mean 10GiB"),
        ({"host_mem": 10}, "did you mean 10GiB"),
        ({"device_mem": "8"}, "did you mean 8GiB"),
        ({"disk": "100B"}, "did you mean 100MiB"),
        ({"disk": "many"}, "not a size"),
        ({"disk": "101%"}, "more than 100 %"),
        ({"host_mem": 4e9}, "not a size"),
        ({"disk": -1}, "disk=-1 is not a size"),
        ({"disk": "9" * 400}, "is more than any machine has"),
        ({"host_mem": "9000000000GiB"}, "host_mem='9000000000GiB' is more than any machine has"),
    ],
)
def test_budgets_that_nobody_means(given: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        EngineOptions(**given)


def test_keeping_all_positions_is_not_sparse() -> None:
    assert [EngineOptions(sparse_attention=share).kept_share for share in (None, 1, 1.0, np.float32(0.5))] == [None, None, None, 0.5]


@pytest.mark.parametrize("given", [{"host_mem": "64MiB"}, {"host_mem": "1.5G"}, {"disk": "0"}, {"device_mem": "50%"}, {"disk": 1 << 30}])
def test_budgets_that_somebody_may_mean(given: dict[str, Any]) -> None:
    EngineOptions(**given)


def test_numbers_may_be_those_of_numpy_and_torch() -> None:
    given = EngineOptions(
        max_model_len=np.int64(100), max_num_seqs=torch.tensor(4), micro_batch_tokens=64.0, seed=np.int32(7), max_logprobs=np.float32(-1),
        max_job_seconds=np.float32(60), host_mem=np.int64(1 << 30),
    )  # fmt: skip
    plain = EngineOptions(
        max_model_len=100, max_num_seqs=4, micro_batch_tokens=64, seed=7, max_logprobs=-1, max_job_seconds=60.0, host_mem=1 << 30
    )
    assert given == plain
    assert {type(value) for value in (given.max_model_len, given.max_num_seqs, given.micro_batch_tokens, given.seed, given.host_mem)} == {
        int
    }


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"seed": 1.5}, "seed must be an integer that fits 64 bits, not 1.5"),
        ({"seed": 2**64}, "seed must be"),
        ({"max_logprobs": None}, "max_logprobs must be"),
        ({"max_logprobs": -2}, "max_logprobs must be an integer of at least -1"),
        ({"max_model_len": True}, "max_model_len must be a positive integer"),
        ({"max_num_seqs": "8"}, "max_num_seqs must be a positive integer, not the text '8'"),
        ({"max_job_seconds": float("nan")}, "max_job_seconds must be a positive number"),
        ({"max_request_seconds": True}, "max_request_seconds must be a positive number"),
        ({"sparse_attention": 0}, r"sparse_attention must be a share above 0 and up to 1 \(0.1, not 10%\), not 0"),
        ({"sparse_attention": 10}, "sparse_attention must be a share"),
        ({"sparse_attention": "10%"}, "sparse_attention must be a share .* not the text '10%'"),
        ({"sparse_attention": float("nan")}, "sparse_attention must be a share"),
        ({"kv": "moon=1"}, "not a tier"),
        ({"weights": {"host": 1}}, "is not a text; write shares"),
        ({"weights": "host=nan"}, "between 0 and 1"),
    ],
)
def test_values_that_are_none_are_refused_before_anything_is_loaded(given: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        EngineOptions(**given)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"weights": "host=2"}, "weights='host=2': a share must be between 0 and 1"),
        ({"weights": "gpu=1"}, "'gpu' is not a tier"),
        ({"kv": "host"}, "'host' is not a share"),
        ({"kv": "host=50%"}, "'50%' is not a share"),
        ({"kv": "host=.5,host=.5"}, "host is there twice"),
        ({"weights": "host=.5"}, "add up to 0.5, not 1"),
        ({"host_mem": "0"}, "host_mem='0' leaves no memory"),
        (
            {"weights": "device=1", "device": "cpu"},
            "weights='device=1': on a CPU device there is no device tier; divide between host, encoded and disk",
        ),
        (
            {"kv": "device=.5,host=.5", "device": "cpu"},
            "kv='device=.5,host=.5': on a CPU device there is no device tier; divide between host and disk",
        ),
        ({"host_mem": 0}, "leaves no memory"),
        ({"host_attention": "off", "device": "cpu"}, "host_attention='off': beside a CPU device there is none to attend on"),
    ],
)
def test_placements_and_budgets_are_looked_at_before_anything_is_read(given: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError) as caught:
        EngineOptions(**given)
    assert said in str(caught.value)


def test_a_tier_that_another_device_may_have() -> None:
    assert EngineOptions(weights="device=1", device="sim").weights == EngineOptions(weights="device=1").weights == "device=1"
    EngineOptions(weights="device=0,host=1", device="cpu")
    EngineOptions(host_attention="on", device="cpu")
    with pytest.raises(OptionError, match="host_attention='off'"):
        EngineOptions(host_attention="off").check_placement("cpu")

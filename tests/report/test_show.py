"""What a run shows, in each of its ways."""

from __future__ import annotations

import dataclasses
import io
import json

import pytest
from fakes import FORECAST, FakeEngine

from flexgen.base.quantities import GIB, format_seconds, parse_seconds
from flexgen.errors import OptionError
from flexgen.plan.workload import Workload
from flexgen.report.format import format_details, format_progress, format_report
from flexgen.report.plans import format_plan
from flexgen.report.progress import Progress, RunReport
from flexgen.report.show import JsonDisplay, PlainDisplay, open_display

ENGINE = FakeEngine(Workload(prompt_lens=(), output_lens=()))
PLAN = ENGINE.plan
PROGRESS = dataclasses.replace(ENGINE._progress(10), num_requests_done=3)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class BrokenPipe(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "-"),
        (0, "0.0 s"),
        (4.24, "4.2 s"),
        (59.94, "59.9 s"),
        (60, "1:00 min"),
        (187, "3:07 min"),
        (3600, "1:00:00 h"),
        (3753, "1:02:33 h"),
    ],
)
def test_durations(seconds: float | None, text: str) -> None:
    assert format_seconds(seconds) == text


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 90), ("0", 0), (".5", 0.5), ("1.5", 1.5), ("90s", 90), ("30min", 1800), ("30 min", 1800), ("30m", 1800), ("8h", 28800),
        ("8 hours", 28800), ("1.5h", 5400), ("1h30m", 5400), ("1h 30min", 5400), ("1d", 86400), ("1D12h", 129600), ("1d2h3m4s", 93784),
    ],
)  # fmt: skip
def test_durations_are_read(text: str, seconds: float) -> None:
    assert parse_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", " ", "h", "-1", "8x", "30m1h", "1h30", "nan", "inf", "8h8h", "1:30", "500ms"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(ValueError, match="write seconds"):
        parse_seconds(text)


def test_a_progress_line_has_everything() -> None:
    line = format_progress(PROGRESS)
    for part in (
        "3/10 requests",
        "prompt 100.0 tokens/s",
        "output 50.0 tokens/s",
        "ETA 1:01 min",
        "unit 1/1",
        "disk_read 90%",
        "compute 50%",
    ):
        assert part in line
    assert "\n" not in line
    assert "scored" not in line
    unknown = dataclasses.replace(PROGRESS, num_requests=None, eta_seconds=None, link_shares={})
    assert "3/? requests" in format_progress(unknown)


def test_workers_have_no_passes_to_tell() -> None:
    line = format_progress(dataclasses.replace(PROGRESS, num_units=0, num_live_sequences=3))
    assert ", 3 live, ETA" in line
    assert "pass" not in line


def test_a_job_that_only_scores_has_no_pace_of_outputs() -> None:
    scoring = dataclasses.replace(PROGRESS, output_tokens=0, output_tokens_per_s=0.0, scored_tokens=70, scored_tokens_per_s=1234.5)
    assert "prompt 100.0 tokens/s, scored 1,234.5 tokens/s, " in format_progress(scoring)
    assert "prompt 100.0 tokens/s, 0 live" in format_progress(dataclasses.replace(PROGRESS, output_tokens_per_s=0.0))
    both = dataclasses.replace(scoring, output_tokens=5, output_tokens_per_s=2.0)
    assert "output 2.0 tokens/s, scored 1,234.5 tokens/s, " in format_progress(both)


def test_the_plan_has_everything() -> None:
    text = format_plan(PLAN)
    for part in ("cpu, float32, diagonal schedule", "host 25.0%, disk 75.0%", "10 B per token", "up to 4 sequences", "64 tokens at a time"):
        assert part in text
    helps = "1 GiB more of host memory (host_mem): +4.1%; disk 10% faster: +6.0%"
    for part in ("expected 2.0 s for 64 output tokens: 32.00 tokens/s", "disk 0.7 s (the bottleneck)", helps):
        assert part in text


def test_what_pads_pages_on_disk_is_told_where_there_are_such() -> None:
    groups = tuple(dataclasses.replace(group, slot_bytes_per_token=12) for group in PLAN.spec.kv_groups)
    padded = dataclasses.replace(PLAN, spec=dataclasses.replace(PLAN.spec, kv_groups=groups))
    on_disk = dataclasses.replace(PLAN.policy, kv_disk_bytes=GIB)
    told = "10 B per token (12 B on disk, where pages are padded to multiples of 4 KiB), pages of 16 tokens"
    assert told in format_plan(dataclasses.replace(padded, policy=on_disk))
    for plan in (padded, dataclasses.replace(PLAN, policy=on_disk)):
        assert "10 B per token, pages of 16 tokens" in format_plan(plan)


def test_the_report_begins_with_three_lines_for_people() -> None:
    forecast = {**dataclasses.asdict(PLAN.forecast), "seconds_of_these_passes": 1.0}
    report = dataclasses.replace(ENGINE.report(), num_requests=5, num_errors=2, forecast=forecast)
    done, speed, limit = format_report(report).splitlines()
    assert done == "done in 2.0 s (after 0.1 s of loading): 3 of 5 requests answered, 2 with errors"
    assert speed == "speed: 1.0 output tokens/s, 0.50 of what was planned (the plan expected 1.0 s for these passes)"
    helps = "disk 10% faster (+6.0% tokens/s), 1 GiB more of host memory (host_mem) (+4.1% tokens/s), compute 10% faster (+4.0% tokens/s)"
    assert limit == f"limit: disk; what would help: {helps}"
    assert format_report(report, "all of it").startswith("done in 2.0 s (after 0.1 s of loading): all of it\n")


def test_values_that_were_not_read_are_told() -> None:
    report = dataclasses.replace(ENGINE.report(), value_bytes_seen=30 << 30, value_bytes_unread=12 << 30, forecast={})
    assert format_report(report).splitlines()[-1] == "sparse attention: 40% of values not read, 12.0 GiB"
    assert "sparse attention" not in format_report(ENGINE.report())
    policy = dataclasses.replace(PLAN.policy, sparse_attention=0.1)
    assert "sparse attention 0.1, " in format_plan(dataclasses.replace(PLAN, policy=policy))


def test_what_sparse_attention_is_expected_to_save_is_told() -> None:
    policy = dataclasses.replace(PLAN.policy, sparse_attention=0.1)
    for times, told in (
        (0.834, "is expected to take 0.83 of the time of dense attention"),
        (None, "is counted as dense: this machine has"),
    ):
        plan = dataclasses.replace(PLAN, policy=policy, forecast=dataclasses.replace(FORECAST, sparse_over_dense=times))
        assert [told in line for line in format_plan(plan).splitlines() if line.strip().startswith("sparse attention")] == [True]
    assert "sparse" not in format_plan(PLAN)


def test_a_job_that_only_scores_is_told_in_tokens_of_prompts() -> None:
    report = dataclasses.replace(
        ENGINE.report(), prompt_tokens=900, output_tokens=0, output_tokens_per_s=0.0, scored_tokens=40, prompt_tokens_per_s=450.0,
        forecast={"num_passes": 1, "output_tokens_per_s": 0.0, "seconds": 2.0, "seconds_of_these_passes": 1.0, "bottleneck": "compute",
                  "gain_per_gib": {}, "gain_per_rate": {}},
    )  # fmt: skip
    assert format_report(report).splitlines()[1].startswith("speed: 450.0 prompt tokens/s, shared ones included (1.00 requests/s), 0.50 of")
    details = format_details(report)
    assert "900 prompt and 0 output tokens, 40 tokens scored, in 3 passes" in details
    assert "expected: 2.0 s; for the passes that were made 1.0 s" in details
    forecast = dataclasses.replace(FORECAST, output_tokens=0, prompt_tokens=900, scored_tokens=40)
    text = format_plan(dataclasses.replace(PLAN, forecast=forecast))
    assert "expected 2.0 s for 900 prompt tokens and 40 scored positions: 450.00 prompt tokens/s; the longest request takes" in text
    both = format_plan(dataclasses.replace(PLAN, forecast=dataclasses.replace(FORECAST, scored_tokens=40)))
    assert "expected 2.0 s for 64 output tokens and 40 scored positions: 32.00 tokens/s" in both


def test_what_is_to_be_said_of_the_machine_stands_behind_the_speed() -> None:
    forecast = {**dataclasses.asdict(PLAN.forecast), "seconds_of_these_passes": 1.0}
    report = dataclasses.replace(ENGINE.report(), elapsed_seconds=20.0, forecast=forecast, rate_ratios={"disk": 0.5, "compute": 1.0})
    lines = format_report(report).splitlines()
    assert [line.split()[0] for line in lines] == ["done", "speed:", "disk", "limit:"]
    assert "disk was 50% slower than in the profile of this machine" in lines[2]


def test_a_report_without_a_forecast_compares_nothing() -> None:
    assert format_report(dataclasses.replace(ENGINE.report(), forecast={})).splitlines()[1:] == ["speed: 1.0 output tokens/s"]


def test_where_nothing_would_help_that_is_said() -> None:
    forecast = {**dataclasses.asdict(PLAN.forecast), "gain_per_gib": {}, "gain_per_rate": {"disk": 0.001}}
    report = dataclasses.replace(ENGINE.report(), forecast={**forecast, "seconds_of_these_passes": 1.0})
    assert format_report(report).splitlines()[-1] == "limit: disk; nothing would help much by itself"


def test_the_details_have_everything() -> None:
    text = format_details(ENGINE.report())
    for part in ("overlap 0.90   plan 0.80   efficiency 0.72", "3 passes", "host memory: peak 1.0 GiB of 2.0 GiB", "disk_read 0.2 s"):
        assert part in text
    table = {line.split()[0]: line.split() for line in text.splitlines() if line}
    assert table["weights"] == ["weights", "250", "B", "750", "B"]
    assert table["kv"] == ["kv", "640", "B", "-"]
    assert table["disk_read"] == ["disk_read", "2.2", "KiB", "750", "B", "1.8", "s", "90%"]
    assert table["compute"] == ["compute", "-", "-", "0.3", "s", "15%"]
    assert "device" not in text


def report_of(ratios: dict[str, float], busy_cores: float = 0.1, **checked: dict[str, float]) -> RunReport:
    at_check = {"check_rates": checked, "busy_cores": busy_cores, "overlap_at_check": 0.8, "efficiency_at_check": 0.75}
    figures = at_check if checked else {}
    forecast = dataclasses.asdict(FORECAST) | {"seconds_of_these_passes": 1.9}
    return dataclasses.replace(ENGINE.report(), elapsed_seconds=20.0, forecast=forecast, rate_ratios=ratios, **figures)


def test_a_slow_machine_is_told_from_a_slow_engine() -> None:
    report = report_of({"compute": 0.5}, start={"compute": 0.6, "disk_read": 1.0}, end={"compute": 0.4})
    slow, details = format_report(report), format_details(report)
    assert "compute was 50% slower than in the profile of this machine, and so was this machine itself (0.40 of its profile's rate)" in slow
    assert "overlap 0.90   plan 0.80   efficiency 0.72" in details
    assert "before and after the run: compute 0.60 and 0.40, disk read 1.00; at these rates overlap 0.80, efficiency 0.75" in details
    assert "flexgen profile" not in slow
    engine = format_report(report_of({"compute": 0.5}, start={"compute": 1.0}, end={"compute": 0.9}))
    assert "compute was 50% slower than in the profile of this machine, though this machine itself was not" in engine
    assert "flexgen profile" not in engine
    busy = format_report(report_of({"compute": 0.5}, busy_cores=1.6, start={"compute": 1.0}, end={"compute": 1.0}))
    assert (
        "compute was 50% slower than in the profile of this machine: other programs kept 1.6 cores busy meanwhile; the profile is kept"
        in busy
    )
    disk = format_report(report_of({"disk": 0.5}, start={"compute": 1.0, "disk_read": 0.5}, end={"compute": 1.0, "disk_read": 0.5}))
    assert "disk was 50% slower than in the profile of this machine, and so was this machine itself (0.50" in disk


def test_a_short_run_says_nothing_of_the_machine() -> None:
    assert "compute was" not in format_report(dataclasses.replace(report_of({"compute": 0.5}), elapsed_seconds=0.1))


def test_a_run_that_was_not_checked_does_not_blame_the_profile() -> None:
    unknown = format_report(report_of({"compute": 0.5}))
    assert "this machine itself" not in unknown
    assert "compute was 50% slower than in the profile of this machine: other programs may have been using it; the profile" in unknown
    assert "compute was 40% faster than in the profile of this machine: `flexgen profile` measures" in format_report(
        report_of({"compute": 1.4})
    )
    assert "than in the profile of this machine" not in format_report(report_of({"compute": 0.9, "disk": 1.1}))


def test_the_report_of_a_run_that_did_nothing() -> None:
    report = dataclasses.replace(
        ENGINE.report(),
        elapsed_seconds=0.0,
        num_passes=0,
        placement={},
        bytes_moved={},
        busiest_seconds={},
        wait_seconds={},
        finish_reasons={},
    )
    assert "waited for: nothing" in format_details(report)
    assert format_report(report).startswith("done in 0.0 s")


def test_plain_shows_one_line_per_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    messages, results = io.StringIO(), io.StringIO()
    display = PlainDisplay(messages, results, interval_seconds=10)
    for _ in range(30):
        now += 1
        display.progress(PROGRESS)
    assert messages.getvalue() == (format_progress(PROGRESS) + "\n") * 3
    display.message("hello")
    display.plan(PLAN)
    display.report(ENGINE.report())
    assert messages.getvalue().endswith(f"hello\n{format_plan(PLAN)}\n")
    assert results.getvalue() == format_report(ENGINE.report()) + "\n"
    display.details(ENGINE.report())
    assert results.getvalue().endswith(f"\n\n{format_details(ENGINE.report())}\n")


def test_plain_steps_have_a_stream_of_their_own() -> None:
    messages, steps = io.StringIO(), io.StringIO()
    open_display("plain", messages, io.StringIO(), steps=steps).step("loading weights ...")
    assert (messages.getvalue(), steps.getvalue()) == ("", "loading weights ...\n")
    open_display("plain", messages, io.StringIO()).step("loading weights ...")
    assert messages.getvalue() == "loading weights ...\n"


def test_json_shows_only_events() -> None:
    messages, results = io.StringIO(), io.StringIO()
    display = JsonDisplay(messages, results, interval_seconds=0)
    display.step("hello")
    display.plan(PLAN)
    display.progress(PROGRESS)
    display.report(ENGINE.report(), "all of it")
    display.details(ENGINE.report())
    assert messages.getvalue() == ""
    events = [json.loads(line) for line in results.getvalue().splitlines()]
    assert [event.pop("event") for event in events] == ["message", "plan", "progress", "message", "report"]
    assert events[0] == {"text": "hello"}
    assert events[1]["policy"]["schedule"] == "diagonal"
    assert Progress(**events[2]) == PROGRESS
    assert events[3] == {"text": "all of it"}
    assert RunReport(**events[4]) == ENGINE.report()


def test_rich_draws_on_a_terminal_and_takes_it_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    messages, results = Terminal(), io.StringIO()
    display = open_display("auto", messages, results)
    display.step("[a step]")
    display.message("[not markup]")
    display.step("another step")
    display.progress(PROGRESS)
    display.progress(dataclasses.replace(PROGRESS, num_requests=None, link_shares={}))
    display.close()
    display.close()
    drawn = messages.getvalue()
    for part in ("[a step]", "[not markup]", "another step", "3/10 requests", "ETA 1:01 min", "disk_read"):
        assert part in drawn
    assert drawn.count("\x1b[?25l") == drawn.count("\x1b[?25h") == 1  # the cursor is back


def test_auto_is_plain_without_a_terminal() -> None:
    assert type(open_display("auto", io.StringIO(), io.StringIO())) is PlainDisplay


def test_none_shows_warnings_and_the_report_only() -> None:
    messages, results = io.StringIO(), io.StringIO()
    display = open_display("none", messages, results)
    display.step("hello")
    display.message("hello")
    display.plan(PLAN)
    display.progress(PROGRESS)
    display.warning("beware")
    display.report(ENGINE.report())
    display.close()
    assert messages.getvalue() == "beware\n"
    assert results.getvalue().startswith("done in 2.0 s")


@pytest.mark.parametrize("name", ["plain", "rich", "json"])
def test_a_warning_is_a_message(name: str) -> None:
    shown: list[str] = []
    for how in ("warning", "message"):
        messages, results = io.StringIO(), io.StringIO()
        display = open_display(name, messages, results)
        getattr(display, how)("beware")
        display.close()
        shown.append(messages.getvalue() + results.getvalue())
    assert "beware" in shown[0]
    assert shown[0] == shown[1]


@pytest.mark.parametrize("name", ["plain", "rich"])
def test_plans_and_reports_name_options_as_their_reader_writes_them(name: str) -> None:
    messages, results = io.StringIO(), io.StringIO()
    display = open_display(name, messages, results, spelled=lambda text: text.replace("host_mem", "HOST"))
    display.plan(PLAN)
    display.report(dataclasses.replace(ENGINE.report(), forecast={**dataclasses.asdict(PLAN.forecast), "seconds_of_these_passes": 1.0}))
    display.close()
    assert "1 GiB more of host memory (HOST): +4.1%" in messages.getvalue()
    assert "1 GiB more of host memory (HOST) (+4.1% tokens/s)" in results.getvalue()


def test_an_unknown_display_lists_the_known() -> None:
    with pytest.raises(OptionError, match="auto, rich, plain, json, none"):
        open_display("fancy", io.StringIO(), io.StringIO())


@pytest.mark.parametrize("name", ["plain", "json", "none"])
def test_a_reader_who_left_stops_nothing(name: str) -> None:
    display = open_display(name, BrokenPipe(), BrokenPipe())
    display.message("hello")
    display.report(ENGINE.report())

"""What is made of measurements: the page, its plots, and what stress, regress and the rivals read."""

from __future__ import annotations

import copy
import json
import os
import time
from typing import Any

import pytest

from vm import config, log, page, plot, regress, rivals, stress

RACES = """\
seed 77, __kevent100
400692 rounds accounted for of 418000, 4188398 tickles, none lost; 1173986 waits ended by EINTR, \
23296 by events, 3723 by their timeouts, 7953 with an error in a change; 34114 empty polls, 13094 bursts, \
274 timeouts raced, 31 signals, 12 forks, 722 waits closed
"""
FUZZ = """\
seed 5, __kevent100
kqueues come from the pool kmem-00160
pool file: 90 objects out after 500 inputs, 93 at the end
pool kmem-00160: 400 objects out after 500 inputs, 380 at the end
pool some pool: 1 objects out after 500 inputs, 1501 at the end
9000 inputs, no call hung
"""


def percentiles(p50: int, samples: int = 10_000) -> dict[str, Any]:
    every = {"samples": samples, "p50": p50, "p99": 2 * p50, "percentiles": [p50 + n for n in range(100)]}
    if samples >= 10_000:
        every["p999"] = 3 * p50
    return {"p50": [p50, p50 + 2], "p99": [2 * p50, 2 * p50], "all": every}


def way(name: str, cost: float) -> dict[str, Any]:
    trips = round(20 * cost)
    numbers: dict[str, Any] = {"descriptors": 0, "calls": 1, "lost": 0}
    for state in ("awake", "pending", "asleep"):
        numbers[f"{state}_ns"] = [cost, cost]
    for senders in (1, 2, 4, 8):
        numbers[f"per_second_{senders}"] = [1e9 / cost] * 2
        numbers[f"received_{senders}"] = [1e8 / cost] * 2
    numbers["latency_ns"] = percentiles(trips // 2)
    numbers["round_trip_ns"] = percentiles(trips)
    numbers["behind_note_ns"] = percentiles(trips, 2000)
    if name != "KQUEUE_TICKLE":
        numbers["behind_event_ns"] = percentiles(4 * trips, 2000)
    return numbers


def run(variant: str, where: str = "guest (tcg)") -> dict[str, Any]:
    costs = {"KQUEUE_TICKLE": 500.0, "EVFILT_USER": 2000.0, "pipe": 1200.0}
    if variant == "stock":
        del costs["KQUEUE_TICKLE"]
    crowd = {f"of_{count}": [1.0, 1.0] for count in (2, 4, 8)} | {"of_1_beside_a_poller": [0.6, 0.5]}
    floor = {"fioclex_ns": [480, 480], "fioclex_awake_ns": [400, 400], "getppid_ns": [170, 171]}
    python = {"send_s": 2e-6, "send_spread_s": 1e-7, "wake_p50_s": 3e-5, "wake_p50_spread_s": 1e-6}
    return {
        "where": where,
        "variant": variant,
        "netbsd": "10.99.12",
        "cpus": 2,
        "c": {
            "abi": "__kevent100",
            "rounds": 2,
            "floor": floor,
            "ways": {name: way(name, cost) for name, cost in costs.items()},
            "returns_for_a_tickle": {"tickles": 123} | crowd,
        },
        "python": {"results": {"KQUEUE_TICKLE": python}, "driver": {}},
    }


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What bench, stress and regress leave, small; the model, which the page runs, is left out."""
    monkeypatch.setattr(page, "_model", lambda: {"states": 57464, "scenarios": 9, "mutants": 14})
    machine = {"cpu": "a CPU", "cpus": 2, "qemu": "7.2", "date": "2026-01-02", "load_before": 0.5}
    place = {"where": "guest, PYKQ", "netbsd": "10.99.12", "accelerator": "tcg", "cpus": 2}
    ran = [
        {**place, "program": "races", **stress.numbers(RACES), "seconds": 9.0},
        {**place, "program": "fuzz", **stress.numbers(FUZZ), "seconds": 300.0},
        {**place, "program": "pytest", "tests": 30, "skipped": 2, "seconds": 20.0},
        {"what": "rules stock 4", "failed": "it broke", "seconds": 1.0},
    ]
    runs = [run("stock"), run("patched"), run("patched", "rump kernel")]
    outcomes = {"stock": {"suite": {"a": "passed"}}, "patched": {"suite": {"a": "failed: so"}}}
    return {
        "bench": {"machine": machine, "runs": runs},
        "stress": {"machine": machine, "ran": ran},
        "regress": {"machine": machine, "outcomes": outcomes},
    }


def rows(text: str, begins: str) -> list[list[str]]:
    """The cells of the table rows that begin so."""
    lines = [line for line in text.splitlines() if line.startswith(f"| {begins} |")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_page_says_which_bars_are_missed_and_in_which_state(results):
    text = page.text(results)
    assert rows(text, "send, awake, of EVFILT_USER's, awake")[0][1:] == ["0.3", "0.250"]
    assert rows(text, "send, awake, of FIOCLEX's, one by one like it")[0][1:] == ["1.15", "1.250 **missed**"]
    assert rows(text, "send, pending, of FIOCLEX's, in a row like it")[0][1:] == ["1.15", "1.042"]
    missed = "Missed: send, awake, of FIOCLEX's, one by one like it: 1.250 instead of 1.15 (guest, 2 CPUs)."
    assert missed in text


def test_the_page_begins_with_what_came_of_it(results):
    begins = " ".join(page.text(results).partition("## The bars")[0].split())
    assert "a tickle costs 500 ns (guest, 2 CPUs), 0.25 of an EVFILT_USER trigger and 0.42 of" in begins
    assert "400,692 of them accounted for one by one" in begins
    assert "1 tests by others, stock beside patched: 1 came out differently, see below" in begins
    assert "55% of the tickles reached the sleeper" in begins
    assert "5 of 6 are met on the patched kernel" in begins


def test_the_page_says_when_no_bar_is_missed(results):
    for one in results["bench"]["runs"]:
        one["c"]["floor"]["fioclex_awake_ns"] = [500, 500]
    assert "Missed: none." in page.text(results)


def test_the_page_shows_what_was_measured(results):
    text = page.text(results)
    stock_pipe, pipe = rows(text, "pipe")[:2]
    one_way_and_round_trip = ["12.0 ±0.0", "24.0 ±0.0", "48.0 ±0.0", "72.0"]
    assert stock_pipe[4:8] == pipe[4:8] == one_way_and_round_trip
    behind_a_stream = ["10.0 ±0.0", "20.0 ±0.0", "none", "none"]
    assert ["KQUEUE_TICKLE", *behind_a_stream] in rows(text, "KQUEUE_TICKLE")
    assert "kevent is __kevent100" in text
    assert "a round is 123 tickles" in text
    assert "400,692 accounted for one by one; 274 timeouts raced; 31 signals; 12 forks" in text
    assert "files +3, kmem-00160 (kqueues) -20" in text
    assert "guest, PYKQ 10.99.12 tcg" in text
    assert "rules stock 4 | **failed: it broke**" in text
    assert "has 57464 states in 9 scenarios" in text
    assert "$" not in text


def test_a_difference_is_on_the_page_with_its_explanation(results, monkeypatch):
    assert "suite, a: stock passed, patched failed: so; not explained" in page.text(results)
    monkeypatch.setitem(regress.EXPLAINED, ("suite", "a"), "it looks at the clock")
    assert "suite, a: stock passed, patched failed: so; it looks at the clock" in page.text(results)


def test_few_samples_have_no_high_percentile(results):
    trips = results["bench"]["runs"][1]["c"]["ways"]["pipe"]["round_trip_ns"]
    del trips["p99"], trips["all"]["p999"]
    assert rivals.delays(results["bench"]["runs"][1]["c"]["ways"]["pipe"])[2:] == ["", ""]


def test_what_several_guests_measured_is_joined():
    parts = [
        {"netbsd": "10", "ns": [0, number], "all": {"p50": number, "percentiles": [number, 2 * number]}}
        for number in (3, 1, 2)
    ]
    assert rivals.joined(parts) == {
        "netbsd": "10",
        "ns": [0, 3, 0, 1, 0, 2],
        "all": {"p50": 2, "percentiles": [2, 4]},
    }


def test_the_tables_show_a_run_with_and_without_a_tickle(results, capsys):
    for one in results["bench"]["runs"]:
        rivals.show_run(one)
    assert "KQUEUE_TICKLE" in capsys.readouterr().out


def test_plots_are_drawn_and_the_same_numbers_make_the_same_file(results, tmp_path):
    pytest.importorskip("matplotlib")
    runs = copy.deepcopy(results["bench"]["runs"])
    del runs[1]["c"]["ways"]["pipe"]["round_trip_ns"]["all"]["p999"]
    files = plot.draw(runs, tmp_path)
    assert sorted(path.name for path in files) == [
        "round_trip.png", "round_trip.svg", "throughput.png", "throughput.svg"
    ]
    before = [path.read_bytes() for path in files]
    assert [path.read_bytes() for path in plot.draw(runs, tmp_path)] == before


def test_without_a_patched_kernel_nothing_is_drawn(results, tmp_path):
    assert plot.draw(results["bench"]["runs"][:1], tmp_path) == []


def test_what_races_and_fuzz_print_is_read():
    races, fuzz = stress.numbers(RACES), stress.numbers(FUZZ)
    assert races["rounds"] == 400692
    assert races["tickles"] == 4188398
    assert races["abi"] == "__kevent100"
    assert fuzz["kept"] == {"file": 3, "kmem-00160": -20, "some pool": 1500}
    assert stress.leaks(races) == {}


def test_a_leak_is_told_by_its_pool():
    assert stress.leaks(stress.numbers(FUZZ)) == {"some pool": 1500}


def test_a_fuzzer_that_saw_no_files_proves_nothing():
    with pytest.raises(log.TestsFailed, match="does not tell of the pools file"):
        stress.leaks(stress.numbers(FUZZ.replace("pool file:", "pool other:")))


@pytest.fixture
def stress_without_kernels(monkeypatch, tmp_path):
    """stress.run() until the tests of the rules; what it calls on the way, and the folder of all kernels."""

    def fails(*_: object) -> dict[str, Any]:
        raise log.Failure("it broke")

    def stops(*_: object) -> dict[str, Any]:
        raise KeyboardInterrupt

    fails.__name__ = "_races_on_rump"
    monkeypatch.setattr(stress, "resolve", lambda settings: settings)
    for name in ("build_for_guest", "build_kernels", "build_rump", "select"):
        monkeypatch.setattr(stress, name, lambda *_, **__: None)
    for name in ("kernel_folder", "rump_folder"):
        monkeypatch.setattr(stress, name, lambda *_, **__: tmp_path)
    monkeypatch.setattr(stress, "_races_on_rump", fails)
    monkeypatch.setattr(stress, "_fuzz_rump", lambda *_: {"program": "libFuzzer", "inputs": 1})
    monkeypatch.setattr(stress, "_rules", stops)

    def run(*, resume: bool = False) -> list[dict[str, Any]]:
        settings = config.load()
        with pytest.raises(KeyboardInterrupt):
            stress.run(settings, rounds=30, minutes=1, resume=resume)
        found: list[dict[str, Any]] = json.loads(
            (settings.cache / "stress" / "stress.json").read_text()
        )["ran"]
        return found

    return run


def test_stress_keeps_what_ran_before_it_is_stopped(stress_without_kernels):
    ran = stress_without_kernels()
    assert [one.get("program", one.get("what")) for one in ran] == ["races on rump 30", "libFuzzer"]
    assert ran[0]["failed"] == "it broke"


def test_stress_resumes_with_what_has_not_passed(stress_without_kernels, monkeypatch, tmp_path):
    stress_without_kernels()
    monkeypatch.setattr(stress, "_races_on_rump", lambda *_: {"program": "races", "rounds": 30})
    monkeypatch.setattr(stress, "_fuzz_rump", lambda *_: {"program": "libFuzzer", "inputs": 2})
    ran = stress_without_kernels(resume=True)
    assert [one.get("rounds", one.get("inputs")) for one in ran] == [30, 1]
    manifest = tmp_path / "manifest.json"
    manifest.write_text("{}")
    os.utime(manifest, (time.time() + 60,) * 2)
    assert [one.get("rounds", one.get("inputs")) for one in stress_without_kernels(resume=True)] == [30, 2]


def test_only_what_comes_out_differently_is_a_difference():
    stock = {"suite": {"same": "failed: one way", "other": "passed", "gone": "passed"}}
    patched = {"suite": {"same": "failed: another way", "other": "skipped: why"}}
    found = regress.compare({"stock": stock, "patched": patched})
    expected = [("suite", "gone", "passed", "not run"), ("suite", "other", "passed", "skipped: why")]
    assert found == expected
    assert regress.tally(stock["suite"]) == "1 failed, 2 passed"

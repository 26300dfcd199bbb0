"""What the benchmarks for kills and memory count, on cases made by hand."""

import os
import subprocess
import sys

import kills
import memory
import pytest
import synthetic


def attempt(*records, finished=()):
    return kills.Attempt(True, None, finished=set(finished), records=set(records))


def test_a_record_made_in_any_earlier_attempt_counts_as_made_again():
    found = kills.redone([attempt("a", "b"), attempt("c"), attempt("b", "c", "d", finished=["g"])])
    assert found == {"groups_again": [[], []], "records_again": [[], ["b", "c"]]}
    found = kills.redone([attempt(finished=["g"]), attempt(finished=["g", "h"])])
    assert found["groups_again"] == [["g"]]


def test_two_records_made_again_are_a_failure_and_one_is_not():
    row = {"kills": ["solving"], "groups_again": [[]], "failure": ""}
    bench = kills.Bench.__new__(kills.Bench)
    bench.variant, bench.seconds, bench.n_records, bench.expected = "one-shot:plain", 1.0, 9, {}
    bench.rows = [row | {"records_again": [["a"]]}, row | {"records_again": [["a", "b"]]}]
    found = kills.totals([bench])
    assert found["failures"] == bench.rows[1:]
    assert (found["kills"], found["identical"], found["records_again_max"]) == (2, 2, 2)
    assert found["records_again_mean"] == pytest.approx(1.5)


def test_a_log_that_a_kill_cut_off_is_read_as_far_as_it_is_whole(tmp_path):
    log = tmp_path / "log"
    log.write_bytes(b'{"stage": "solving", "finished": "g"}\n{"record": "group-0"}\n{"stage": "wri')
    found = kills.Attempt(True, None)
    kills.read_log(log, found)
    assert (found.stage, found.finished, found.records) == ("solving", {"g"}, {"group-0"})


def test_files_that_only_one_folder_has_are_differences():
    assert kills.differences({"a": "1", "b": "2"}, {"b": "3", "c": "4"}) == ["a", "b", "c"]


@pytest.mark.parametrize("options", [["--max-memory", "8GiB", "-x"], ["-x", "--max-memory=8GiB"], ["-x"]])
def test_the_limit_and_its_value_are_left_out(options):
    assert memory.without_limit(options) == ["-x"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_peak_of_a_process_and_its_children_is_seen(tmp_path):
    code = "data = bytearray(60 * 2**20); import time; time.sleep(1)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}]); {code}"
    peak, written = memory.watch(subprocess.Popen([sys.executable, "-c", parent]), tmp_path / "none")
    assert peak.processes == 2
    assert peak.main >= 60 * 2**20
    assert peak.anonymous >= 60 * 2**20
    assert written == 0
    assert memory.read_memory(os.getpid())["VmRSS"] > 0


def test_the_needs_of_a_model_are_those_of_its_largest_block(tmp_path):
    synthetic.llama_config(2, 64, 112, 4, 2, 99).save_pretrained(tmp_path)
    widths = 64 * (64 + 32 + 32 + 64) + 3 * 64 * 112 + 2 * 64
    grams = 64**2 + 64**2 + 64**2 + 112**2  # attention, its output, gate and up, down
    assert memory.needs(tmp_path) == {"block_float32": 4 * widths, "grams_float64": 8 * grams}

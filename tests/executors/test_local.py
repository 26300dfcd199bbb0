"""Tasks in this process and in several: the same results, and nothing lost with a worker."""

import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
from functools import partial
from pathlib import Path

import numba
import numpy as np
import pytest
import torch

from cospadi.errors import CheckpointError, NumericalError, UnavailableError, UsageError
from cospadi.executors import Task, WorkerLostError, make_executor
from cospadi.executors.local import LocalExecutor, SerialExecutor, devices_of_workers
from cospadi.executors.outcome import unpack_outcome
from cospadi.executors.parallel import RETRIES
from tests.executors import tasks as t

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def two():
    with LocalExecutor(["cpu", "cpu:0"], threads=1) as executor:  # two names of one device, to tell workers apart
        yield executor
    assert not multiprocessing.active_children()


def products(order):
    return [
        t.task(seed, t.product, seed, cost=float(order[seed]), inputs=partial(t.matrix, seed))
        for seed in range(len(order))
    ]


def assert_same(left, right):
    assert left.keys() == right.keys()
    for index in left:
        assert torch.equal(left[index][0], right[index][0])
        assert np.array_equal(left[index][1], right[index][1])


def test_two_workers_give_the_bytes_of_one_in_any_order(two):
    one = make_executor("local", device="cpu", workers=1, threads=1)
    expected = t.collect(one, products(range(6)))
    assert list(expected) == list(range(6))
    assert_same(t.collect(two, products(range(6))), expected)
    assert_same(t.collect(two, products([3, 1, 4, 1, 5, 9])), expected)


def test_no_tasks(two):
    assert t.collect(two, []) == {}


def test_one_worker_keeps_the_order_given_and_stays_in_this_process(tmp_path):
    with make_executor("local", device="cpu", workers=1, threads=1) as executor:
        costs = [1.0, 3.0, 2.0]
        t.collect(executor, [t.task(i, t.note, tmp_path, str(i), cost=cost) for i, cost in enumerate(costs)])
        assert t.begun(tmp_path) == ["0", "1", "2"]
        assert t.collect(executor, [t.task(0, t.processes)])[0] == (None, os.getpid())


def test_the_largest_is_begun_first(tmp_path):
    # one worker process, so that the order in which tasks begin is the order in which they were sent
    with LocalExecutor(["cpu"], 1) as executor:
        costs = [2.0, 7.0, 7.0, 1.0, 9.0]
        t.collect(executor, [t.task(i, t.note, tmp_path, str(i), cost=cost) for i, cost in enumerate(costs)])
    assert t.begun(tmp_path) == ["4", "1", "2", "0", "3"]


def test_a_task_reads_its_inputs_in_its_own_process(two):
    (read_in, run_in) = t.collect(two, [t.task(0, t.processes, inputs=t.process_of_inputs)])[0]
    assert read_in == run_in != os.getpid()


def test_new_tasks_begin_before_the_caller_has_handled_a_result(tmp_path):
    with LocalExecutor(["cpu"], 1) as executor:
        results = executor.run([t.task(i, t.note, tmp_path, str(i)) for i in range(3)])
        next(results)
        t.wait_for(lambda: t.begun(tmp_path) == ["0", "1"])  # the second without the caller asking for it
        results.close()


@pytest.mark.parametrize(("workers", "numbers"), [(1, (1, 2, 3)), (2, (3,))])
def test_a_task_has_the_threads_asked_for(workers, numbers):
    blas_before = t.threads("cpu", None)[2]
    torch_before = torch.get_num_threads()  # after numba's first call, which sets OpenMP's number
    for asked in numbers:
        with make_executor("local", device="cpu", workers=workers, threads=asked) as executor:
            assert executor.threads == asked
            for _ in range(2):
                of_torch, of_numba, pools = t.collect(executor, [t.task(0, t.threads)])[0]
                assert of_torch == asked
                assert of_numba == min(asked, numba.config.NUMBA_NUM_THREADS)
                assert ("openmp", "libgomp") in pools or sys.platform != "linux"
                assert any(api == "blas" for api, _ in pools)
                assert set(pools.values()) == {asked}
    assert torch.get_num_threads() == torch_before
    after = t.threads("cpu", None)[2]
    assert {name: after[name] for name in blas_before} == blas_before


def test_threads_are_put_back_while_the_caller_handles_a_result_and_after_an_error():
    before = torch.get_num_threads()
    executor = make_executor("local", device="cpu", workers=1, threads=before + 1)
    for _ in executor.run([t.task(0, t.threads)]):
        assert torch.get_num_threads() == before
    with pytest.raises(NumericalError):
        t.collect(executor, [t.task(0, t.fail, "numerical")])
    assert torch.get_num_threads() == before


def test_threads_of_this_process_are_divided_among_the_workers(monkeypatch):
    for total, workers, expected in ((8, None, 8), (8, 3, 2), (2, 5, 1)):
        monkeypatch.setattr("cospadi.executors.choose.available_threads", lambda total=total: total)
        assert make_executor("local", device="cpu", workers=workers).threads == expected


def test_a_killed_worker_loses_nothing(two, tmp_path):
    tasks = [t.task(i, t.die_once, tmp_path / f"died{i}", i) for i in range(2)] + products(range(4))
    found = t.collect(two, tasks)
    assert [found[i][0] for i in range(2)] == [0, 1]
    assert len(list(tmp_path.iterdir())) == 2
    expected = t.collect(SerialExecutor("cpu", 1), products(range(4)))
    assert_same({i: found[2 + i] for i in range(4)}, expected)


def test_an_idle_worker_that_was_killed_is_replaced(two):
    found = t.collect(two, [t.task(i, t.processes) for i in range(2)])
    for process in multiprocessing.active_children():
        process.kill()
        process.join()
    again = t.collect(two, [t.task(i, t.processes) for i in range(2)])
    assert {pid for _, pid in found.values()}.isdisjoint(pid for _, pid in again.values())


def test_a_task_that_always_dies_ends_in_an_error_that_names_it_and_the_others_survive(two, tmp_path):
    tasks = [t.task("bad", t.die_always, tmp_path, cost=1.0), *products([5, 6, 7, 8])]
    found = {}
    with pytest.raises(WorkerLostError, match=r"layer\.bad: the worker was killed \(SIGKILL\).*memory") as error:
        t.collect(two, tasks, found)
    assert str(error.value).count("\n") == 0
    assert len(list(tmp_path.iterdir())) == RETRIES + 1
    assert set(found) == {1, 2, 3, 4}


def test_a_worker_that_leaves_by_itself_is_lost_too(two, monkeypatch):
    monkeypatch.setattr("cospadi.executors.parallel.RETRIES", 0)
    with pytest.raises(WorkerLostError, match="ended with exit code 3"):
        t.collect(two, [t.task(0, t.leave, 3)])


def test_an_error_of_a_task_keeps_its_type_and_text(two):
    for executor in (two, SerialExecutor("cpu", 1)):
        with pytest.raises(NumericalError, match=r"^layer\.7: 3 values are NaN$") as error:
            t.collect(executor, [t.task(0, t.fail, "numerical")])
        assert type(error.value) is NumericalError
        with pytest.raises(ValueError, match=r"^plain$"):
            t.collect(executor, [t.task(0, t.fail, "value")])
        with pytest.raises(CheckpointError, match=r"^shard 3 is cut short$"):
            t.collect(executor, [t.task(0, t.device, inputs=t.fail_to_read)])


def test_the_traceback_of_the_worker_is_the_cause(two):
    with pytest.raises(NumericalError) as error:
        t.collect(two, [t.task(0, t.fail, "numerical")])
    assert "tasks.py" in str(error.value.__cause__)


def test_an_error_that_pickle_cannot_bring_back_comes_as_text(two):
    with pytest.raises(RuntimeError, match="AwkwardError: a because b"):
        t.collect(two, [t.task(0, t.fail, "foreign")])


def test_what_cannot_be_pickled_is_an_error_and_no_hang(two):
    with pytest.raises(Exception, match=r"pickle|local object"):
        t.collect(two, [t.task(0, t.give_lambda)])
    with pytest.raises(Exception, match=r"pickle|local object"):
        t.collect(two, [Task("layer.0", 1.0, lambda device, inputs: 1)])
    assert t.collect(two, [t.task(0, t.device)]) == {0: "cpu"}


def test_after_an_error_what_runs_is_finished_and_nothing_else_begins(two, tmp_path, monkeypatch):
    mine, other = tmp_path / "running", tmp_path / "failed"
    tasks = [
        t.task(0, t.touch_and_wait, mine, other, "kept", cost=9.0),
        t.task(1, t.fail_when, mine, cost=8.0),
        t.task(2, t.note, tmp_path, "begun", cost=1.0),
    ]
    found = {}

    def unpack(outcome):
        try:
            return unpack_outcome(outcome)
        except NumericalError:
            other.touch()  # the other task, which still runs, may finish from now on
            raise

    monkeypatch.setattr("cospadi.executors.parallel.unpack_outcome", unpack)
    with pytest.raises(NumericalError):
        t.collect(two, tasks, found)
    assert found == {0: "kept"}
    assert not list(tmp_path.glob("* begun"))


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"


def pids(folder):
    return [int(path.name) for path in folder.iterdir() if path.name.isdigit()]


def test_leaving_early_stops_what_runs_and_the_executor_still_works(two, tmp_path):
    results = two.run([t.task(0, t.hold, tmp_path, tmp_path / "never", cost=2.0), t.task(1, t.device)])
    assert next(results) == (1, "cpu:0")
    t.wait_for(lambda: pids(tmp_path))
    results.close()
    assert not any(alive(pid) for pid in pids(tmp_path))
    assert t.collect(two, [t.task(0, t.device)]) == {0: "cpu"}


SCRIPT = """
    import sys
    from pathlib import Path
    from cospadi.executors import make_executor
    from tests.executors import tasks as t

    if {guard}:
        with make_executor("local", device="cpu", workers=2, threads=1) as executor:
            folder = Path(sys.argv[1])
            t.collect(executor, [t.task(i, t.hold, folder, folder / "never") for i in range(5)])
"""


def start(tmp_path, guard="__name__ == '__main__'"):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT.format(guard=guard)))
    folder = tmp_path / "pids"
    folder.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, script, folder], env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    return process, folder


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.slow
@pytest.mark.parametrize("how", ["interrupt", "kill"])
def test_ctrl_c_and_a_killed_parent_leave_no_orphans(tmp_path, how):
    process, folder = start(tmp_path)
    t.wait_for(lambda: len(pids(folder)) == 2 or process.poll() is not None)
    if how == "interrupt":
        os.killpg(process.pid, signal.SIGINT)  # to workers as well, as a terminal does
    else:
        process.kill()
    _, errors = process.communicate()
    assert process.returncode == (-signal.SIGKILL if how == "kill" else -signal.SIGINT)
    assert errors.count("Traceback") == (0 if how == "kill" else 1), errors  # the parent's own
    assert len(pids(folder)) == 2
    t.wait_for(lambda: not any(alive(pid) for pid in pids(folder)))


@pytest.mark.slow
def test_a_script_without_a_guard_is_told_so(tmp_path):
    process, _ = start(tmp_path, guard="True")
    _, errors = process.communicate()
    assert process.returncode == 1
    (last,) = [line for line in errors.splitlines() if "WorkerLostError: layer." in line]
    assert "the worker process could not start" in last
    assert 'if __name__ == "__main__"' in last


@pytest.mark.parametrize(
    ("device", "n_gpus", "workers", "expected"),
    [
        ("cpu", 0, None, ["cpu"]),
        ("cpu", 4, 3, ["cpu"] * 3),
        ("cuda", 1, None, ["cuda"]),
        ("cuda", 3, None, ["cuda:0", "cuda:1", "cuda:2"]),
        ("cuda", 3, 2, ["cuda:0", "cuda:1"]),
        ("cuda", 2, 5, ["cuda:0", "cuda:1", "cuda:0", "cuda:1", "cuda:0"]),
        ("cuda:2", 3, None, ["cuda:2"]),
        ("cuda:2", 3, 2, ["cuda:2", "cuda:2"]),
    ],
)
def test_gpus_are_dealt_out(device, n_gpus, workers, expected, monkeypatch):
    assert devices_of_workers(device, n_gpus, workers) == expected
    monkeypatch.setattr(torch.cuda, "device_count", lambda: n_gpus)
    executor = make_executor("local", device=torch.device(device), workers=workers, threads=1)
    assert executor.n_workers == len(expected)
    if len(expected) > 1:
        assert list(executor.devices) == expected
    else:
        assert isinstance(executor, SerialExecutor)
        assert t.collect(executor, [t.task(0, t.device)]) == {0: expected[0]}


def test_two_run_at_once_each_told_the_device_of_its_worker(two, tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"  # each waits for the other
    assert t.collect(two, [t.task(0, t.meet, here, there), t.task(1, t.meet, there, here)]) == {0: "cpu", 1: "cpu:0"}


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"name": "rya"}, "did you mean 'ray'"),
        ({"workers": 0}, "workers must be at least 1, not 0"),
        ({"threads": -1}, "threads must be at least 1, not -1"),
        ({"ray_inputs": "objects"}, "unknown ray inputs 'objects'"),
        ({"ray_address": "auto"}, "for executor ray, not local"),
        ({"ray_inputs": "object-store"}, "for executor ray, not local"),
        ({"name": "ray", "device": "cuda:1"}, "Ray, which assigns the GPUs"),
    ],
)
def test_misuse_is_refused_at_once(options, text):
    with pytest.raises(UsageError, match=text) as error:
        make_executor(**{"name": "local", "device": "cpu", **options})
    assert "\n" not in str(error.value)


def test_a_machine_without_gpu_is_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UnavailableError, match="no CUDA GPU"):
        make_executor("local", device="cuda", workers=2)


def test_ray_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UnavailableError, match=r"pip install 'cospadi\[ray\]'"):
        make_executor("ray", device="cpu")

"""Tasks on a real Ray cluster of several nodes, which are processes of this machine."""

import logging
import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch

from cospadi.errors import CheckpointError, CospadiError, NumericalError, UnavailableError, UsageError
from cospadi.executors import WorkerLostError, make_executor
from cospadi.executors.local import SerialExecutor
from cospadi.executors.ray import check_versions
from tests.executors import tasks as t

pytestmark = pytest.mark.slow
ray = pytest.importorskip("ray")

STORE = 100_000_000
"""Bytes of each node's object store."""


@pytest.fixture(scope="module")
def cluster():
    from ray.cluster_utils import Cluster

    soon = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 4}
    head = {"num_cpus": 2, "object_store_memory": STORE, "include_dashboard": False, "_system_config": soon}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    cluster.second = cluster.add_node(num_cpus=2, object_store_memory=STORE)
    yield cluster
    cluster.shutdown()


def join(cluster, **options):
    return make_executor("ray", device="cpu", ray_address=cluster.address, **options)


@pytest.fixture(scope="module")
def executor(cluster):
    with join(cluster) as executor:
        yield executor
    assert not ray.is_initialized()


def test_the_bytes_are_those_of_the_local_run(executor):
    tasks = [t.task(seed, t.product, seed, cost=seed, inputs=partial(t.matrix, seed)) for seed in range(6)]
    expected = t.collect(SerialExecutor("cpu", 1), tasks)
    found = t.collect(executor, tasks)
    assert found.keys() == expected.keys()
    for index in expected:
        assert torch.equal(found[index][0], expected[index][0])
        assert np.array_equal(found[index][1], expected[index][1])


def test_the_cluster_tells_how_many_run_at_once(executor):
    assert (executor.threads, executor.n_workers) == (1, 4)
    # inside the module's connection, which a second executor uses as it is and leaves open
    with make_executor("ray", device="cpu", threads=2, workers=1) as second:
        assert (second.threads, second.n_workers) == (2, 1)
        of_torch, _, pools = t.collect(second, [t.task(0, t.threads)])[0]
        assert of_torch == 2
        assert set(pools.values()) == {2}
    assert ray.is_initialized()


def test_where_inputs_are_read(executor):
    read_in, run_in = t.collect(executor, [t.task(0, t.processes, inputs=t.process_of_inputs)])[0]
    assert read_in == run_in != os.getpid()
    with make_executor("ray", device="cpu", ray_inputs="object-store") as carrying:
        read_in, run_in = t.collect(carrying, [t.task(0, t.processes, inputs=t.process_of_inputs)])[0]
        assert read_in == os.getpid() != run_in
        with pytest.raises(CheckpointError, match=r"^shard 3 is cut short$"):
            t.collect(carrying, [t.task(0, t.device, inputs=t.fail_to_read)])
        assert not carrying._tasks


@pytest.mark.parametrize("inputs", ["shared", "object-store"])
def test_large_inputs_and_results_can_be_written_to(executor, inputs):
    with make_executor("ray", device="cpu", ray_inputs=inputs) as carrying:
        array, tensor = t.collect(carrying, [t.task(0, t.writable, inputs=t.arrays)])[0]
    assert array.sum() == tensor.sum() == array.size
    array += 1
    tensor += 1


def test_inputs_in_the_store_are_dropped_with_their_tasks(executor):
    with make_executor("ray", device="cpu", ray_inputs="object-store") as carrying:
        tasks = [t.task(i, t.device, inputs=t.arrays) for i in range(40)]  # 3.6 MB each, more than the store holds
        for _ in carrying.run(tasks):
            assert len(carrying._tasks) <= carrying.n_workers + 2
        assert not carrying._tasks


def test_an_error_of_a_task_keeps_its_type_and_text(executor):
    with pytest.raises(NumericalError, match=r"^layer\.7: 3 values are NaN$") as error:
        t.collect(executor, [t.task(0, t.fail, "numerical")])
    assert type(error.value) is NumericalError
    with pytest.raises(CheckpointError, match=r"^shard 3 is cut short$"):
        t.collect(executor, [t.task(0, t.device, inputs=t.fail_to_read)])
    with pytest.raises(RuntimeError, match="AwkwardError: a because b"):
        t.collect(executor, [t.task(0, t.fail, "foreign")])


def test_a_killed_worker_loses_nothing(executor, tmp_path):
    tasks = [t.task(i, t.die_once, tmp_path / f"died{i}", i) for i in range(2)]
    tasks += [t.task(i, t.device) for i in range(2, 6)]
    found = t.collect(executor, tasks)
    assert [found[i][0] for i in range(2)] == [0, 1]
    assert len(list(tmp_path.iterdir())) == 2
    assert [found[i] for i in range(2, 6)] == ["cpu"] * 4


def test_a_task_that_always_dies_ends_in_an_error_that_names_it(executor, tmp_path, monkeypatch):
    monkeypatch.setattr("cospadi.executors.parallel.RETRIES", 1)
    found = {}
    with pytest.raises(WorkerLostError, match=r"layer\.bad: the worker was lost \(WorkerCrashedError") as error:
        t.collect(executor, [t.task("bad", t.die_always, tmp_path), t.task(1, t.device)], found)
    assert "\n" not in str(error.value)
    assert len(list(tmp_path.iterdir())) == 2
    assert found == {1: "cpu"}


def test_leaving_early_stops_what_runs(executor, tmp_path):
    results = executor.run([t.task(0, t.hold, tmp_path, tmp_path / "never"), t.task(1, t.device)])
    assert next(results) == (1, "cpu")
    t.wait_for(lambda: list(tmp_path.iterdir()))
    results.close()
    (pid,) = (int(path.name) for path in tmp_path.iterdir())
    t.wait_for(lambda: not os.path.exists(f"/proc/{pid}"))


def test_functions_of_a_script_can_be_run(executor):
    from cospadi.executors import Task

    assert t.collect(executor, [Task("layer.0", 1.0, lambda device, inputs: [device, inputs], lambda: 3)]) == {
        0: ["cpu", 3]
    }


def test_other_versions_are_refused_by_the_worker(executor, monkeypatch):
    monkeypatch.setattr("cospadi.executors.ray._versions", lambda: {"cospadi": "0.0.7", "torch": "1.0", "numpy": "1"})
    with pytest.raises(UnavailableError, match=r"cospadi \S+ instead of 0\.0\.7, torch \S+ instead of 1\.0") as error:
        t.collect(executor, [t.task(0, t.device)])
    assert "\n" not in str(error.value)


def test_only_versions_that_differ_are_named():
    check_versions({"torch": "2.9", "numpy": "2"}, {"torch": "2.9", "numpy": "2", "cospadi": "1"})
    with pytest.raises(UnavailableError, match=r"has numpy 1 instead of 2, which"):
        check_versions({"torch": "2.9", "numpy": "2"}, {"torch": "2.9", "numpy": "1"})


def test_what_the_cluster_cannot_do_is_refused_before_any_work(executor, cluster):
    for options, kind, text in [
        ({"device": "cuda"}, UnavailableError, "no node of the Ray cluster has a GPU"),
        ({"threads": 99}, UsageError, "no node of the Ray cluster has 99 CPUs: use fewer threads"),
        ({"ray_address": "192.0.2.1:6379"}, UsageError, "has joined Ray at .* already, not 192.0.2.1:6379"),
    ]:
        with pytest.raises(kind, match=text) as error:
            make_executor("ray", **{"device": "cpu", **options})
        assert "\n" not in str(error.value)
    assert ray.is_initialized()
    assert make_executor("ray", device="cpu", ray_address="auto").n_workers == 4


def node_ids(folder):
    return [path.name.split()[1] for path in sorted(folder.iterdir()) if " " in path.name]


def test_a_node_that_leaves_loses_nothing_and_one_that_comes_late_gets_work(executor, cluster, tmp_path, caplog):
    """All tasks run until the late node has begun one."""
    caplog.set_level(logging.INFO, logger="cospadi.executors")
    go = tmp_path / "go"
    leaving = cluster.second.node_id
    with ThreadPoolExecutor(1) as thread:  # nodes can only be added from the main thread
        collected = thread.submit(t.collect, executor, [t.task(i, t.hold_on_node, tmp_path, go) for i in range(12)])
        t.wait_for(lambda: node_ids(tmp_path).count(leaving) == 2)
        cluster.remove_node(cluster.second, allow_graceful=False)
        late = cluster.add_node(num_cpus=3, object_store_memory=STORE).node_id
        t.wait_for(lambda: node_ids(tmp_path).count(late) == 3)
        go.touch()
        found = collected.result()
    assert sorted(found) == list(range(12))
    assert leaving not in found.values()
    assert set(found.values()) == {cluster.head_node.node_id, late}
    assert caplog.text.count("was lost") == 2
    assert executor.n_workers == 5


def test_a_ray_of_our_own_is_ended_with_the_executor():
    # in a process of its own, because this one is connected
    code = (
        "import ray, sys\n"
        "from cospadi.executors import make_executor\n"
        "from tests.executors import tasks as t\n"
        "with make_executor('ray', device='cpu', workers=2, threads=1) as executor:\n"
        "    assert executor.n_workers == 2\n"
        "    print(sorted(t.collect(executor, [t.task(i, t.device) for i in range(3)]).items()))\n"
        "print(ray.is_initialized())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[(0, 'cpu'), (1, 'cpu'), (2, 'cpu')]", "False"]
    assert done.stderr == ""


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nonsense", "ray://127.0.0.1:1"])
def test_a_cluster_out_of_reach(address, monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(UnavailableError, match=f"no Ray cluster at '{address}'") as error:
        make_executor("ray", device="cpu", ray_address=address)
    assert "\n" not in str(error.value)


def test_every_error_of_cospadi_survives_the_way_back():
    import cospadi.backends.cuda.nvrtc
    import cospadi.pipeline.solve_groups

    kinds, new = set(), {CospadiError}
    while new:
        kinds |= new
        new = {child for kind in new for child in kind.__subclasses__()} - kinds
    kinds = {kind for kind in kinds if kind.__module__.startswith("cospadi")}
    assert {WorkerLostError, NumericalError, CheckpointError, cospadi.backends.cuda.nvrtc.KernelError} <= kinds
    for kind in kinds:
        copy = pickle.loads(pickle.dumps(kind("layer.7: text")))
        assert type(copy) is kind
        assert str(copy) == "layer.7: text"

"""Two workers of MultiWorkerMirroredStrategy over loopback, each a process: worker.py."""

import json
import pathlib
import shutil
import signal
import socket

import processes
import pytest

HERE = pathlib.Path(__file__).parent
TIME_LIMIT = 400
MODES = ["accum_steps", "micro_batch_size"]
TRAININGS = [*MODES, "loop", "batch_norm", "batch_norm_saved"]


def run_workers(scenarios, directory, expected=(0, 0)):
    """Runs two workers and returns the results of each by scenario. A worker whose peer was killed is ended."""
    sockets = [socket.socket() for _ in range(2)]
    for each in sockets:
        each.bind(("localhost", 0))
    cluster = {"worker": [f"localhost:{each.getsockname()[1]}" for each in sockets]}
    for each in sockets:
        each.close()
    workers, logs = [], [directory / f"{index}.log" for index in range(2)]
    for index in range(2):
        task = {"cluster": cluster, "task": {"type": "worker", "index": index}}
        environment = {"TF_CONFIG": json.dumps(task), "CUDA_VISIBLE_DEVICES": ""}
        script = (HERE / "worker.py", directory, *scenarios)
        workers.append(processes.Script(*script, output=logs[index], environment=environment))
    try:
        codes = [0, 0]
        codes[1] = workers[1].wait(TIME_LIMIT)
        if codes[1] != 0:  # the first worker would wait for the second
            workers[0].kill()
        codes[0] = workers[0].wait(TIME_LIMIT)
    finally:
        for worker in workers:
            if worker.poll() is None:
                worker.kill()
                worker.wait()
        for index, log in enumerate(logs):
            print(f"worker {index}:", log.read_text()[-10_000:])
    assert tuple(codes) == expected
    if any(expected):
        return None
    return [json.loads((directory / f"{index}.json").read_text()) for index in range(2)]


@pytest.fixture(scope="module")
def results(request, tmp_path_factory):
    """A function that returns both workers' results of a scenario. One pair of workers runs all that are asked for.

    So these tests should run in one process: `--dist loadfile`.
    """
    cases = [item.callspec.params for item in request.session.items if getattr(item, "callspec", None) is not None]
    asked = {case.get("scenario") for case in cases}
    trainings = [scenario for scenario in TRAININGS if scenario in asked]
    found = run_workers([*trainings, "backed_up", "disagreeing"], tmp_path_factory.mktemp("workers"))

    def of(scenario):
        both = [results[scenario] for results in found]
        assert not any("raised" in result for result in both), both
        return both

    return of


def check_both(both):
    assert all(result["difference"] <= 1e-5 for result in both)
    assert both[0]["weights"] == both[1]["weights"]


@pytest.mark.parametrize("scenario", TRAININGS)
@pytest.mark.some_by_default(3)
def test_workers(results, scenario):
    check_both(results(scenario))


@pytest.mark.exhaustive
@pytest.mark.parametrize("mode", MODES)
def test_every_optimizer(mode, tmp_path):
    scenario = f"{mode}, every optimizer"
    check_both([result[scenario] for result in run_workers([scenario], tmp_path)])


def test_a_worker_that_is_killed_in_mid_window(results, tmp_path):
    """And whose peer has not finished its newest backup: both go on from the one before, of an open window."""
    undisturbed = results("backed_up")
    run_workers(["killed"], tmp_path, expected=(-signal.SIGKILL, -signal.SIGKILL))
    assert [len(list((tmp_path / f"backup_{index}").iterdir())) for index in range(2)] == [2, 2]
    shutil.rmtree(tmp_path / "backup_0" / "backup-00000002")
    resumed = [result["backed_up"] for result in run_workers(["backed_up"], tmp_path)]
    assert [result["step_at_start"] for result in undisturbed + resumed] == [0, 0, 2, 2]
    assert resumed[0]["weights"] == resumed[1]["weights"]
    for mine, wanted in zip(resumed[0]["weights"], undisturbed[0]["weights"], strict=True):
        assert mine == pytest.approx(wanted, abs=1e-6)


def test_workers_that_restored_other_backups(results):
    assert all("do not go on from the same point" in result["error"] for result in results("disagreeing"))

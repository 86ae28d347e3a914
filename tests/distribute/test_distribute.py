"""Runs what needs devices or processes of its own: replicas on logical CPU devices, and workers over loopback."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys

import pytest

HERE = pathlib.Path(__file__).parent
TIME_LIMIT = 240
CHECKS = ["mirrored_training", "mirrored_batch_norm", "mirrored_loops", "mirrored_features", "mirrored_state"]
CHECKS += ["mirrored_scaling"]


@pytest.mark.parametrize("checks", CHECKS)
def test_replicas_on_logical_devices(checks):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST_", "TF_CONFIG"))}
    ran = subprocess.run(
        [*command, str(HERE / f"{checks}.py")], env=environment, capture_output=True, text=True, timeout=TIME_LIMIT
    )
    print(ran.stdout[-20_000:], ran.stderr[-5_000:])
    assert ran.returncode == 0


def run_workers(scenario, directory, expected=(0, 0)):
    """Runs two workers, and returns what each has to tell; a worker whose peer was killed is ended."""
    ports = []
    sockets = [socket.socket() for _ in range(2)]
    for each in sockets:
        each.bind(("localhost", 0))
        ports.append(each.getsockname()[1])
    for each in sockets:
        each.close()
    cluster = {"worker": [f"localhost:{port}" for port in ports]}
    workers, logs = [], []
    for index in range(2):
        task = {"cluster": cluster, "task": {"type": "worker", "index": index}}
        environment = {**os.environ, "TF_CONFIG": json.dumps(task), "CUDA_VISIBLE_DEVICES": ""}
        log = (directory / f"{scenario}_{index}.log").open("w+")
        command = [sys.executable, str(HERE / "worker.py"), scenario, str(directory)]
        workers.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
        logs.append(log)
    try:
        codes = [0, 0]
        codes[1] = workers[1].wait(TIME_LIMIT)
        if codes[1] != 0:  # the other one would wait for it
            workers[0].kill()
        codes[0] = workers[0].wait(TIME_LIMIT)
    finally:
        for worker in workers:
            if worker.poll() is None:
                worker.kill()
                worker.wait()
        for index, log in enumerate(logs):
            log.seek(0)
            print(f"worker {index}:", log.read()[-10_000:])
            log.close()
    assert tuple(codes) == expected
    if any(expected):
        return None
    return [json.loads((directory / f"{scenario}_{index}.json").read_text()) for index in range(2)]


@pytest.mark.parametrize("scenario", ["accum_steps", "micro_batch_size", "loop", "batch_norm", "batch_norm_saved"])
def test_workers(scenario, tmp_path):
    results = run_workers(scenario, tmp_path)
    assert all(result["difference"] <= 1e-5 for result in results)
    assert results[0]["weights"] == results[1]["weights"]


def test_a_worker_that_is_killed_in_mid_window(tmp_path):
    (tmp_path / "undisturbed").mkdir()
    undisturbed = run_workers("backed_up", tmp_path / "undisturbed")
    run_workers("killed", tmp_path, expected=(-signal.SIGKILL, -signal.SIGKILL))
    resumed = run_workers("backed_up", tmp_path)
    assert [result["step_at_start"] for result in undisturbed + resumed] == [0, 0, 2, 2]
    assert resumed[0]["weights"] == resumed[1]["weights"]
    for mine, wanted in zip(resumed[0]["weights"], undisturbed[0]["weights"], strict=True):
        assert mine == pytest.approx(wanted, abs=1e-6)


def test_workers_that_restored_other_backups(tmp_path):
    results = run_workers("disagreeing", tmp_path)
    assert all("do not go on from the same point" in result["error"] for result in results)

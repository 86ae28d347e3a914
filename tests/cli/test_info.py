import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from click.testing import CliRunner

import accumops
from accumops.cli import main
from accumops.ops import library

_ROOT = Path(__file__).parents[2]


def invoke(*arguments):
    result = CliRunner().invoke(main, arguments)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_help_lists_the_commands():
    result = invoke("--help")
    assert result.exit_code == 0
    for command in ("info", "verify", "demo"):
        assert f"  {command} " in result.stdout


def test_version():
    assert invoke("--version").stdout == f"accumops {accumops.__version__}\n"


def test_unknown_command_is_a_usage_error():
    assert invoke("nonsense").exit_code == 2


def test_json_is_all_that_python_m_prints():
    environment = {name: value for name, value in os.environ.items() if name != "TF_CPP_MIN_LOG_LEVEL"}
    done = subprocess.run(
        [sys.executable, "-m", "accumops", "info", "--json"],
        capture_output=True,
        text=True,
        check=True,
        cwd=_ROOT,
        env=environment,
    )
    assert json.loads(done.stdout)["versions"]["tensorflow"] == tf.__version__
    assert done.stderr == ""


def test_json_describes_machine_and_build():
    facts = json.loads(invoke("info", "--json").stdout)
    assert facts["versions"] == {
        "accumops": accumops.__version__,
        "python": platform.python_version(),
        "tensorflow": tf.__version__,
        "keras": keras.__version__,
        "numpy": np.__version__,
    }
    assert facts["build"] == accumops.build_info()
    assert facts["backend"]["chosen"] == accumops.get_backend()
    assert "CPU:0" in [device["name"] for device in facts["machine"]["devices"]]


def test_table_has_versions_and_reasons():
    output = invoke("info").stdout
    assert tf.__version__ in output
    assert "loaded" in output
    assert "\x1b" not in output  # plain where there is no terminal


def test_private_names_that_are_gone_are_shown(monkeypatch):
    owner = next(kind for kind in keras.optimizers.Optimizer.__mro__ if "_use_weight_decay" in vars(kind))
    monkeypatch.delattr(owner, "_use_weight_decay")
    assert "have no `keras.optimizers.Optimizer._use_weight_decay`" in invoke("info").stdout


def test_reason_is_shown_where_nothing_is_loaded(monkeypatch):
    monkeypatch.setattr(library, "load", lambda: (None, "the dynamic linker refused it [really]"))
    assert "not loaded: the dynamic linker refused it [really]" in invoke("info").stdout
    facts = json.loads(invoke("info", "--json").stdout)
    assert facts["build"]["loaded"] is False
    assert facts["backend"]["cpu"] == {"runs": "reference", "reason": "the dynamic linker refused it [really]"}


def test_chosen_reference_is_shown():
    accumops.set_backend("reference")
    try:
        assert "reference, as it was chosen" in invoke("info").stdout
    finally:
        accumops.set_backend("auto")


@pytest.mark.parametrize("present", [True, False], ids=["with kernels", "without kernels"])
def test_module_of_kernels_may_be_missing(monkeypatch, present):
    class Kernels:
        @staticmethod
        def instruction_set():
            return "avx2"

        @staticmethod
        def instruction_sets():
            return ["baseline", "avx2"]

        @staticmethod
        def cuda_status():
            return {"runtime_version": 12050, "driver_version": 13000, "error": None}

    monkeypatch.setattr(library, "load_kernels", lambda: Kernels if present else None)
    facts = json.loads(invoke("info", "--json").stdout)
    assert facts["cpu_kernels"]["instruction_set"] == ("avx2" if present else None)
    assert facts["cuda"]["driver_supports"] == ("13.0" if present else None)
    assert ("in use: avx2" if present else "is not installed") in invoke("info").stdout


@pytest.mark.parametrize("command", ["info", "verify"])
def test_bad_environment_variable_is_a_usage_error(monkeypatch, command):
    monkeypatch.setenv("ACCUMOPS_BACKEND", "fastest")
    monkeypatch.setattr(library, "_backend", None)
    result = invoke(command)
    assert result.exit_code == 2
    assert "'fastest'" in result.stderr

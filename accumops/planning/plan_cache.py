"""Plans that were found before, in a file: the same model on the same device need not be measured again.

The file is `plans.json` in the folder that the environment variable `ACCUMOPS_CACHE_DIR` names; by default that is
`accumops` in `XDG_CACHE_HOME` or `~/.cache`. An empty value keeps no file.
"""

import dataclasses
import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from accumops.memory.segments import Segment
from accumops.ops import get_backend
from accumops.planning.micro_batch_plan import MeasuredMicroBatch, MicroBatchPlan

_FORMAT = 1  # the version of the file's layout


def key_of(fingerprint: str, device: str, **settings: Any) -> str:
    """What a plan depends on, as a string.

    Args:
        fingerprint: The fingerprint of the traced pass.
        device: The device.
        **settings: What was asked for.
    """
    if device == "CPU:0":
        threads = tf.config.threading
        where = [os.cpu_count(), threads.get_inter_op_parallelism_threads(), threads.get_intra_op_parallelism_threads()]
    else:
        where = [tf.config.experimental.get_device_details(each) for each in tf.config.list_physical_devices("GPU")[:1]]
    versions = [_FORMAT, tf.__version__, keras.__version__, get_backend()]
    described = json.dumps([fingerprint, device, where, versions, settings], sort_keys=True, default=str)
    return hashlib.sha256(described.encode()).hexdigest()


def stored_plan(key: str) -> MicroBatchPlan | None:
    """Returns the plan that was stored with a key, or None."""
    entry = _read().get(key)
    if entry is None:
        return None
    measured = tuple(MeasuredMicroBatch(**each) for each in entry["measured"])
    segments = tuple(tuple(_segment(each) for each in region) for region in entry["recompute"])
    return MicroBatchPlan(**{**entry, "measured": measured, "recompute": segments, "notes": tuple(entry["notes"])})


def store_plan(key: str, plan: MicroBatchPlan) -> None:
    """Stores a plan. A folder that cannot be written costs a warning."""
    folder = _folder()
    if folder is None:
        return
    # `asdict` would turn segments, which are tuples with names, into what JSON writes without them.
    entry = {field.name: getattr(plan, field.name) for field in dataclasses.fields(plan)}
    entry["measured"] = [dataclasses.asdict(each) for each in plan.measured]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, path = tempfile.mkstemp(dir=folder, suffix=".json")
        with os.fdopen(handle, "w") as file:
            json.dump({**_read(), key: entry}, file)
        os.replace(path, folder / "plans.json")
    except OSError as error:
        warnings.warn(
            f"The plan of a micro-batch could not be stored and is found again next time: {error}. "
            "ACCUMOPS_CACHE_DIR names another folder.",
            stacklevel=2,
        )


def _read() -> Mapping[str, Any]:
    """What the file holds; nothing if there is none, or if it is damaged: then it is written anew."""
    folder = _folder()
    if folder is None:
        return {}
    try:
        found = json.loads((folder / "plans.json").read_text())
    except (FileNotFoundError, PermissionError, json.JSONDecodeError):
        return {}
    return found if isinstance(found, dict) else {}


def _folder() -> Path | None:
    given = os.environ.get("ACCUMOPS_CACHE_DIR")
    if given is not None:
        return Path(given) if given else None
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "accumops"


def _segment(entry: list[Any]) -> Segment:
    begin, end, recomputed, saved = entry
    return Segment(begin, end, recomputed, tuple(saved))

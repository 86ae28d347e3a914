"""What update(), squared_norms() and clip_units() reject; see also test_kernel_arguments.py. No failed call writes
anything."""

import numpy as np
import pytest
from kernel_definitions import SLOTS
from malformed import LAYOUT, LIST, NO_ARRAY, check_raises, cuda_like, flags, floats, read_only, unaligned

NUMBER = "must be a number, or for CUDA arrays a one-element device array, got {}"


def update_arguments():
    """The arguments of a call of update() that is right: adam over two values."""
    return {
        "rule": "adam",
        "values": [floats(3), floats(4, 2)],
        "slots": [[floats(3), floats(4, 2)], [floats(3), floats(4, 2)]],
        "accumulators": [floats(3), floats(4, 2)],
        "latest": [floats(3, dtype=np.float16), floats(4, 2)],
        "touched_rows": [None, flags(4)],
        "rate": 0.1,
    }


given = floats(3)
UPDATE_ERRORS = {
    "iterations of another rule": (
        {"rule": "lion", "slots": [[floats(3), floats(4, 2)]], "iterations": 3}, ValueError,
        "iterations are for 'adam' and 'amsgrad', not for 'lion'",
    ),
    "negative iterations": ({"iterations": -1}, ValueError, "iterations must be a whole number from 0 on, got -1"),
    "half an iteration": ({"iterations": 1.5}, ValueError, "iterations must be a whole number from 0 on, got 1.5"),
    "iterations nan": ({"iterations": float("nan")}, ValueError, "iterations must be a whole number from 0 on"),
    "iterations str": ({"iterations": "one"}, TypeError, "iterations must be a number"),
    "rule": ({"rule": "adagrad"}, ValueError, "rule must be one of 'sgd', 'momentum', 'nesterov', 'adam', 'amsgrad',"),
    "rule bytes": ({"rule": b"adam"}, TypeError, "rule must be a str, got bytes"),
    "values array": ({"values": floats(3)}, TypeError, "values " + LIST.format("ndarray")),
    "values None": ({"values": None}, TypeError, "values " + LIST.format("NoneType")),
    "a value None": ({"values": [None, floats(4, 2)]}, TypeError, "values[0] " + NO_ARRAY.format("NoneType")),
    "float64 value": (
        {"values": [floats(3), floats(4, 2, dtype=np.float64)]}, TypeError,
        "values[1] has dtype float64; it must be float32",
    ),
    "read-only value": ({"values": [read_only(floats(3)), floats(4, 2)]}, ValueError, "values[0] is read-only"),
    "strided value": ({"values": [floats(6)[::2], floats(4, 2)]}, ValueError, f"values[0] of shape (3,) {LAYOUT}"),
    "unaligned value": ({"values": [unaligned(), floats(4, 2)]}, ValueError, f"values[0] of shape (3,) {LAYOUT}"),
    "slots None": ({"slots": None}, TypeError, "slots must be a sequence with a list of arrays for each slot"),
    "slots of another rule": ({"rule": "lion"}, ValueError, "slots has 2 items; it must have 1, a list of arrays for"),
    "no slots": ({"slots": ()}, ValueError, "slots has 0 items; it must have 2, a list of arrays for each slot of"),
    "slots without lists": ({"slots": [floats(3), floats(3)]}, TypeError, "slots[0] " + LIST.format("ndarray")),
    "a slot too few": (
        {"slots": [[floats(3), floats(4, 2)], [floats(3)]]}, ValueError,
        "slots[1] has 1 items; it must have 2, one for each of values",
    ),
    "a slot's shape": (
        {"slots": [[floats(3), floats(4, 2)], [floats(3), floats(2, 4)]]}, ValueError,
        "slots[1][1] has shape (2, 4); it must have shape (4, 2), that of values[1]",
    ),
    "read-only slot": (
        {"slots": [[floats(3), floats(4, 2)], [read_only(floats(3)), floats(4, 2)]]}, ValueError,
        "slots[1][0] is read-only",
    ),
    "half slot": (
        {"slots": [[floats(3, dtype=np.float16), floats(4, 2)], [floats(3), floats(4, 2)]]}, TypeError,
        "slots[0][0] has dtype float16; it must be float32",
    ),
    "accumulators too few": (
        {"accumulators": [floats(3)]}, ValueError, "accumulators has 1 items; it must have 2, one for each of values",
    ),
    "an accumulator's shape": (
        {"accumulators": [floats(4), floats(4, 2)]}, ValueError,
        "accumulators[0] has shape (4,); it must have shape (3,), that of values[0]",
    ),
    "half accumulator": (
        {"accumulators": [floats(3, dtype=np.float16), None]}, TypeError,
        "accumulators[0] has dtype float16; it must be float32",
    ),
    "no gradients": (
        {"accumulators": None, "latest": None}, ValueError, "accumulators[0] and latest[0] are both None; give one of",
    ),
    "no gradient of one": (
        {"accumulators": [floats(3), None], "latest": [None, None]}, ValueError,
        "accumulators[1] and latest[1] are both None",
    ),
    "wide latest": (
        {"latest": [floats(3, dtype=np.float64), None]}, TypeError,
        "latest[0] has dtype float64; it must be float16, bfloat16 (or its bits as uint16) or float32",
    ),
    "latest's shape": ({"latest": [floats(1), None]}, ValueError, "latest[0] has shape (1,); it must have shape (3,)"),
    "strided latest": ({"latest": [floats(6)[::2], None]}, ValueError, f"latest[0] of shape (3,) {LAYOUT}"),
    "flags' type": (
        {"touched_rows": [None, np.ones(4, np.uint8)]}, TypeError, "touched_rows[1] has dtype uint8; it must be bool",
    ),
    "flags' shape": (
        {"touched_rows": [None, flags(8)]}, ValueError,
        "touched_rows[1] has shape (8,); it must have shape (4,): a flag for each row of values[1]",
    ),
    "flags too few": ({"touched_rows": [None]}, ValueError, "touched_rows has 1 items; it must have 2, one for each"),
    "strided flags": ({"touched_rows": [None, flags(8)[::2]]}, ValueError, f"touched_rows[1] of shape (4,) {LAYOUT}"),
    "scales too few": (
        {"scales": floats(3)}, ValueError,
        "scales has shape (3,); it must have shape (2,), one for each of values, or be one for all",
    ),
    "scales double": ({"scales": np.ones(2)}, TypeError, "scales has dtype float64; it must be float32"),
    "scales text": ({"scales": "1"}, TypeError, "scales " + NUMBER.format("str")),
    "scales on a device": (
        {"scales": cuda_like(shape=(2,))}, ValueError, "scales is in CUDA memory, but values[0] is in host memory",
    ),
    "rate text": ({"rate": "1"}, TypeError, "rate " + NUMBER.format("str")),
    "rate None": ({"rate": None}, TypeError, "rate " + NUMBER.format("NoneType")),
    "rate double on a device": (
        {"rate": cuda_like(shape=(), typestr="<f8")}, TypeError, "rate has dtype <f8; it must be float32",
    ),
    "rate of two": ({"rate": cuda_like(shape=(2,))}, ValueError, "rate has shape (2,); it must have one element"),
    "decay on a device": (
        {"decay": cuda_like(shape=())}, ValueError, "decay is in CUDA memory, but values[0] is in host memory",
    ),
    "weight list": ({"weight": [1.0]}, TypeError, "weight " + NUMBER.format("list")),
    "decays too few": ({"decays": [True]}, ValueError, "decays has 1 items; it must have 2, one for each of values"),
    "decays too many to copy": ({"decays": range(1 << 60)}, ValueError, "decays has 1152921504606846976 items"),
    "decays bool": ({"decays": True}, TypeError, "decays must be None or a sequence of bool, got bool"),
    "overwrite number": ({"overwrite": 1}, TypeError, "overwrite must be a bool"),
    "applies number": ({"applies": 0}, TypeError, "applies must be a bool"),
    "applies of two": ({"applies": flags(2)}, ValueError, "applies has shape (2,); it must have one element"),
    "beta_1": ({"beta_1": "0.9"}, TypeError, "beta_1 must be a number, got str"),
    "beta_2": ({"beta_2": None}, TypeError, "beta_2 must be a number, got NoneType"),
    "epsilon": ({"epsilon": 1j}, TypeError, "epsilon must be a number, got complex"),
    "clip negative": ({"clip": -1.0}, ValueError, "clip must be finite and not negative, got -1.0"),
    "clip NaN": ({"clip": np.nan}, ValueError, "clip must be finite and not negative, got nan"),
    "threads": ({"threads": 0}, ValueError, "threads must be None or an int of at least 1, got 0"),
    "stream": ({"stream": "main"}, TypeError, "incompatible function arguments"),
    "a value twice": (
        {"values": [given, floats(4, 2)], "slots": [[given, floats(4, 2)], [floats(3), floats(4, 2)]]}, ValueError,
        "values[0] and slots[0][0] share memory",
    ),
    "a value as its accumulator": (
        {"values": [given, floats(4, 2)], "accumulators": [given, None]}, ValueError,
        "accumulators[0] and values[0] share memory",
    ),
    "a device array among host arrays": (
        {"latest": [cuda_like(), None]}, ValueError, "latest[0] is in CUDA memory, but values[0] is in host memory",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", UPDATE_ERRORS.values(), ids=UPDATE_ERRORS.keys())
def test_what_update_rejects(kernels, case):
    changes, error, message = case
    arguments = update_arguments() | changes
    lists = [arguments["values"], *(arguments["slots"] or ())]
    written = [each for arrays in lists if isinstance(arrays, list) for each in arrays if isinstance(each, np.ndarray)]
    positional = [arguments.pop(name) for name in ("rule", "values", "slots")]
    check_raises(lambda: kernels.update(*positional, **arguments), written, error, message)


def test_the_call_that_the_errors_are_made_of_is_right(kernels):
    arguments = update_arguments()
    rule, values, slots = (arguments.pop(name) for name in ("rule", "values", "slots"))
    before = [value.copy() for value in values]
    kernels.update(rule, values, slots, **arguments)
    for value, old in zip(values, before, strict=True):
        assert (value != old).all()


def test_rows_of_a_value_without_axes(kernels):
    with pytest.raises(ValueError, match=r"values\[0\] has shape \(\), so touched_rows\[0\] must be None"):
        kernels.update("sgd", [floats()], accumulators=[floats()], touched_rows=[flags(1)], rate=1.0)


@pytest.mark.parametrize("rule", SLOTS)
def test_a_rate_is_needed(kernels, rule):
    with pytest.raises(TypeError, match="incompatible function arguments"):
        kernels.update(rule, [], [[]] * SLOTS[rule])


sums = np.ones(2)
NORM_ERRORS = {
    "array for a list": ([floats(3), sums], {}, TypeError, "arrays " + LIST.format("ndarray")),
    "None": ([[None, floats(3)], sums], {}, TypeError, "arrays[0] " + NO_ARRAY.format("NoneType")),
    "integers": ([[floats(3), np.ones(3, np.int32)], sums], {}, TypeError, "arrays[1] has dtype int32; it must be fl"),
    "strided": ([[floats(6)[::2], floats(3)], sums], {}, ValueError, f"arrays[0] of shape (3,) {LAYOUT}"),
    "unaligned": ([[floats(3), unaligned(np.float16)], sums], {}, ValueError, f"arrays[1] of shape (3,) {LAYOUT}"),
    "few sums": ([[floats(3)], sums], {}, ValueError, "sums has shape (2,); it must have shape (1,), one for each of"),
    "float32 sums": ([[floats(3)], floats(1)], {}, TypeError, "sums has dtype float32; it must be float64"),
    "read-only sums": ([[floats(3)] * 2, read_only(sums)], {}, ValueError, "sums is read-only"),
    "strided sums": ([[floats(3)] * 2, np.ones(4)[::2]], {}, ValueError, f"sums of shape (2,) {LAYOUT}"),
    "sums among the arrays": ([[floats(3), sums], sums], {}, ValueError, "arrays[1] and sums share memory"),
    "workspace": ([[floats(3)] * 2, sums], {"workspace": 8}, TypeError, "workspace " + NO_ARRAY.format("int")),
    "read-only workspace": (
        [[floats(3)] * 2, sums], {"workspace": read_only(floats(9))}, ValueError, "workspace is read-only",
    ),
    "workspace on a device": (
        [[floats(3)] * 2, sums], {"workspace": cuda_like()}, ValueError, "workspace is in CUDA memory, but sums is in",
    ),
    "unaligned workspace": (
        [[floats(3)] * 2, sums], {"workspace": cuda_like(4100)}, ValueError, "workspace is not aligned to 256 bytes",
    ),
    "threads": ([[floats(3)] * 2, sums], {"threads": -1}, ValueError, "threads must be None or an int of at least 1"),
}  # fmt: skip


@pytest.mark.parametrize("case", NORM_ERRORS.values(), ids=NORM_ERRORS.keys())
def test_what_squared_norms_rejects(kernels, case):
    positional, options, error, message = case
    check_raises(lambda: kernels.squared_norms(*positional, **options), [sums], error, message)


def test_the_workspaces_of_a_build_without_cuda_are_empty(kernels):
    norms, batch_norm = kernels.squared_norms_workspace([floats(3)]), kernels.batch_norm_workspace(floats(9, 3))
    assert (norms > 0, batch_norm > 0) == (kernels.build_info()["cuda_runtime_version"] is not None,) * 2
    with pytest.raises(ValueError, match=r"axis is 2, but x has shape \(9, 3\)"):
        kernels.batch_norm_workspace(floats(9, 3), 2)
    with pytest.raises(TypeError, match=r"arrays\[0\] has dtype int64"):
        kernels.squared_norms_workspace([np.arange(3)])


def clips(**changes):
    """The arguments of a call of clip_units() that is right, for two gradients."""
    shapes = [(3, 2), (4,)]
    arguments = {name: [floats(*shape) for shape in shapes] for name in ("gradients", "weights", "outputs")}
    return arguments | {"clip_factor": 0.1, "epsilon": 1e-3} | changes


four = floats(4)
CLIP_ERRORS = {
    "no list": ({"gradients": 3}, TypeError, "gradients"),
    "a weight short": ({"weights": [floats(3, 2)]}, ValueError, "weights has 1 items; it must have 2, one for each of"),
    "an output short": ({"outputs": [floats(3, 2)]}, ValueError, "outputs has 1 items; it must have 2, one for each"),
    "another shape": (
        {"weights": [floats(3, 2), floats(5)]}, ValueError, "weights[1] has shape (5,); it must have shape (4,), the",
    ),
    "another output": (
        {"outputs": [floats(2, 3), floats(4)]}, ValueError, "outputs[0] has shape (2, 3); it must have shape (3, 2),",
    ),
    "a double": (
        {"gradients": [np.ones((3, 2)), floats(4)]}, TypeError, "gradients[0] has dtype float64; it must be float32",
    ),
    "a read-only output": (
        {"outputs": [floats(3, 2), read_only(floats(4))]}, ValueError, "outputs[1] is read-only",
    ),
    "a gradient as output": (
        {"gradients": [floats(3, 2), four], "outputs": [floats(3, 2), four]}, ValueError, "share memory",
    ),
    "no factor": ({"clip_factor": None}, TypeError, "clip_factor must be a number, got NoneType"),
    "a negative factor": ({"clip_factor": -1.0}, ValueError, "clip_factor"),
    "an infinite epsilon": ({"epsilon": np.inf}, ValueError, "epsilon"),
}  # fmt: skip


@pytest.mark.parametrize("case", CLIP_ERRORS.values(), ids=CLIP_ERRORS.keys())
def test_what_clip_units_rejects(kernels, case):
    changes, error, message = case
    arguments = clips(**changes)
    written = [array for array in arguments["outputs"] if isinstance(array, np.ndarray)]
    check_raises(lambda: kernels.clip_units(**arguments), written, error, message)


def test_cuda_arrays_where_cuda_is_missing(kernels):
    status = kernels.cuda_status()
    if status["device_count"] > 0:
        pytest.skip("there is a CUDA device")
    message = "no CUDA kernels" if not status["built"] else "CUDA|cuda"

    def array(i, *shape, typestr="<f4"):
        return cuda_like(4096 * (i + 1), shape, typestr)

    three = [array(i, 3) for i in range(9)]
    count, large = array(20, 1, typestr="<i8"), [array(30 + i, 6, 3) for i in range(3)]
    calls = (
        lambda: kernels.update("sgd", three[:1], accumulators=three[1:2], rate=1.0),
        lambda: kernels.squared_norms(three[:1], array(12, 1, typestr="<f8")),
        lambda: kernels.batch_norm(
            large[0], *three[:2], y=large[1], count=count, mean=three[2], rest=three[3], variance=three[4],
            inverse=three[5],
        ),
        lambda: kernels.batch_norm_gradient(
            large[0], large[1], three[0], mean=three[1], rest=three[2], inverse=three[3], count=None, dx=large[2],
            dgamma=three[4], dbeta=three[5],
        ),
        lambda: kernels.batch_norm_inference(large[0], *three[:4], y=large[1]),
        lambda: kernels.merge_moments([count, *three[:3]], moving=three[3:5]),
        lambda: kernels.clip_units(large[:1], large[1:2], large[2:], clip_factor=0.1, epsilon=0.1),
        lambda: kernels.end_windows([array(50, 3, typestr="<i8")], [array(51, 2, 3, typestr="<f8")]),
    )  # fmt: skip
    for call in calls:
        with pytest.raises(RuntimeError, match=message):
            call()

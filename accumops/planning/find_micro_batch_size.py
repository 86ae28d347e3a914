"""`find_micro_batch_size`: the micro-batch that fits a memory limit and is fastest."""

import contextlib
import math
from typing import Any

import keras
import tensorflow as tf

from accumops.adapters.keras_functional import graph_of
from accumops.adapters.keras_layer import layers_within
from accumops.arguments import check_count
from accumops.memory.profile import memory_of_device
from accumops.memory.slices import whole_tensors
from accumops.planning.loaded_pass import Point
from accumops.planning.measuring import measurer_of
from accumops.planning.micro_batch_plan import MeasuredMicroBatch, MicroBatchPlan, described
from accumops.planning.plan_cache import key_of, store_plan, stored_plan
from accumops.planning.search import Subject, Try, fastest, search
from accumops.planning.traced_pass import TracedPass, trace_pass
from accumops.planning.training_memory import default_limit, fixed_memory
from accumops.sizes import bytes_from, readable
from accumops.window.coupling import couples


def find_micro_batch_size(
    model: keras.Model,
    sample_data: Any,
    *,
    effective_batch_size: int | None = None,
    memory_limit: str | int | None = None,
    recompute: str | bool = "auto",
    margin: float = 0.1,
    verbose: int = 1,
) -> MicroBatchPlan:
    """Finds the micro-batch, and what to recompute, with which training within a memory limit is fastest.

    Measures memory and time of a few micro-batches, from small to large, and stops before the limit. Nothing of the
    model changes: what is measured is a copy of its graph, with variables of its own, on data of zeros. On a CPU it
    runs in a process of its own, which is stopped at the limit; on a GPU in this one.

    On a CPU the limit is for all memory of the process, as the operating system counts it: TensorFlow itself takes
    about 0.6 GiB of it. On a GPU it is for what TensorFlow's allocator gives out. Training takes the weights, their
    accumulators, the optimizer's slots, the batches that `fit` holds (three on a CPU), and a micro-batch.

    Args:
        model: The model, compiled: a `GradientAccumulateModel`, or one that is to be wrapped.
        sample_data: A batch as `fit` gets it, `(x, y)` or `(x, y, sample_weight)`, or a `tf.data.Dataset` of batches.
            Only shapes and dtypes matter.
        effective_batch_size: Samples a window; by default those of `sample_data`.
        memory_limit: The most memory that training may take, in bytes or as `"4GB"`, `"500MiB"`. By default the memory
            of the GPU, or on a CPU the memory that this process can still get.
        recompute: `"auto"` plans recompute where it allows a larger micro-batch that is faster, or the only one that
            fits. False plans none.
        margin: The part of the limit that the plan leaves free.
        verbose: 1 prints each measurement, 0 nothing.

    Returns:
        The plan. `print` shows it as a table; `plan.apply(model)` has the model train like this.

    Raises:
        TypeError: If `model` is not a Keras model, or an argument has another type.
        ValueError: If the model is not compiled or trains on replicas, an argument is out of range, or no micro-batch
            fits: the message says what takes the memory.

    Example:

    >>> net = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])
    >>> model = accumops.GradientAccumulateModel(net, micro_batch_size=1)
    >>> model.compile("adam", "mse")
    >>> data = tf.zeros([64, 8]), tf.zeros([64, 4])
    >>> plan = accumops.find_micro_batch_size(model, data, memory_limit="8GiB", verbose=0)
    >>> plan.micro_batch_size * plan.accum_steps >= 64
    True
    >>> model = plan.apply(model)
    """
    return plan_for_model(model, sample_data, effective_batch_size, memory_limit, recompute, margin, verbose=verbose)


def plan_for_model(
    model: keras.Model,
    sample_data: Any,
    effective_batch_size: int | None,
    memory_limit: str | int | None,
    recompute: str | bool = "auto",
    margin: float = 0.1,
    *,
    verbose: int = 0,
    stored: bool = False,
) -> MicroBatchPlan:
    """As `find_micro_batch_size`; with `stored` also a plan that was stored, if it fits what is there now."""
    _check(model, effective_batch_size, recompute, margin)
    given = None if memory_limit is None else bytes_from("memory_limit", memory_limit)
    is_wrapper = keras.saving.get_registered_name(type(model)) == "accumops>GradientAccumulateModel"
    wrapper: Any = model
    net = wrapper.model if is_wrapper else model
    data = _batch_of(sample_data)
    whole = whole_tensors(data, wrapper.whole_inputs) if is_wrapper else []
    samples = _samples_of(data, whole)
    effective = samples if effective_batch_size is None else int(effective_batch_size)
    if not model.built:
        model(keras.utils.unpack_x_y_sample_weight(data)[0], training=False)
    device = "GPU:0" if tf.config.list_logical_devices("GPU") else "CPU:0"

    def trace() -> TracedPass:
        around = wrapper.owning_windows if is_wrapper else contextlib.nullcontext
        return trace_pass(model, data, whole, jit_compile=bool(model.jit_compile), around=around)

    traced = trace()
    memory = memory_of_device(jit_compile=True)  # on a CPU the operating system counts
    # After the trace, which takes memory itself, as that of training will.
    fixed = fixed_memory(model, memory, traced.bytes_of_batch(effective), device)
    limit = default_limit(device) if given is None else given
    allowed = math.floor(limit * (1 - margin)) - fixed
    key = key_of(traced.fingerprint, device, effective=effective, limit=given, recompute=recompute, margin=margin)
    found = stored_plan(key) if stored else None
    if found is not None and found.predicted_peak - found.fixed <= allowed:
        return found

    def report(tried: Try) -> None:
        if verbose:
            print(_line_of(tried, fixed))  # as Keras's progress bars

    subject = Subject(
        net, traced, trace, lambda each: measurer_of(each, device), effective, allowed, recompute == "auto", report
    )
    searched = search(subject)
    if all(each.point is None for each in searched.tries):
        raise ValueError(_nothing_fits(net, limit, margin, fixed, recompute))
    chosen, point, seconds = fastest(searched.tries, effective)
    plan = MicroBatchPlan(
        micro_batch_size=chosen.micro_batch_size,
        accum_steps=-(-effective // chosen.micro_batch_size),
        effective_batch_size=effective,
        recompute=chosen.segments,
        predicted_peak=fixed + point.peak,
        memory_limit=limit,
        fixed=fixed,
        samples_per_second=effective / seconds,
        measured=tuple(_measured(each, fixed) for each in searched.tries),
        device=device,
        measured_by=searched.measured_by,
        notes=tuple(searched.notes),
    )
    if stored:
        store_plan(key, plan)
    return plan


def _measured(tried: Try, fixed: int) -> MeasuredMicroBatch:
    point: Point | None = tried.point
    return MeasuredMicroBatch(
        tried.micro_batch_size,
        described(tried.segments),
        None if point is None else fixed + point.peak,
        None if point is None else point.seconds,
    )


def _line_of(tried: Try, fixed: int) -> str:
    each = _measured(tried, fixed)
    what = f"micro_batch_size={each.micro_batch_size}, recomputing {each.recompute}: "
    if each.memory is None:
        return what + "over the limit"
    return what + f"{readable(each.memory)}, {each.samples_per_second:.1f} samples a second"


def _nothing_fits(net: keras.Model, limit: int, margin: float, fixed: int, recompute: str | bool) -> str:
    remedies = ["a larger `memory_limit`", "a smaller effective batch", "an optimizer with fewer slots"]
    if not recompute and graph_of(net) is not None:
        remedies.insert(0, 'recompute="auto"')
    return (
        f"No micro-batch of '{net.name}' fits: even one sample takes more than memory_limit={readable(limit)} less a "
        f"margin of {margin:.0%}. {readable(fixed)} do not depend on the micro-batch: the program, weights, "
        f"accumulators, slots and the batches of `fit`. What helps: {', '.join(remedies)}."
    )


def _batch_of(sample_data: Any) -> Any:
    """A batch as a structure of tensors."""
    if isinstance(sample_data, tf.data.Dataset):
        sample_data = next(iter(sample_data), None)
        if sample_data is None:
            raise ValueError("`sample_data` is a dataset without batches.")

    def tensor(leaf: Any) -> Any:
        return None if leaf is None else tf.convert_to_tensor(leaf)

    if isinstance(sample_data, list):
        sample_data = tuple(sample_data)
    try:
        data = keras.tree.map_structure(tensor, sample_data, none_is_leaf=True)
    except (TypeError, ValueError) as error:
        raise TypeError(
            "`sample_data` must be a batch of arrays or tensors, such as `(x, y)`, or a tf.data.Dataset. "
            f"Received: {type(sample_data).__name__}: {error}"
        ) from error
    return data


def _samples_of(data: Any, whole: list[tf.Tensor]) -> int:
    uncut = {id(each) for each in whole}
    leaves = [each for each in keras.tree.flatten(data) if each is not None and id(each) not in uncut]
    sizes = {int(each.shape[0]) for each in leaves if each.shape.rank}
    if len(sizes) != 1 or 0 in sizes:
        raise ValueError(
            "The tensors of `sample_data` must have the same number of samples, at least one, along their first axis. "
            f"Received the shapes: {[tuple(each.shape) for each in leaves]}"
        )
    return sizes.pop()


def _check(model: Any, effective_batch_size: Any, recompute: Any, margin: Any) -> None:
    if not isinstance(model, keras.Model):
        raise TypeError(f"`model` must be a keras.Model. Received: {model!r}")
    if not model.compiled:
        raise ValueError(
            f"'{model.name}' is not compiled. Its loss, the slots of its optimizer, and whether XLA compiles it decide "
            "what fits: call `compile` first."
        )
    if model.distribute_strategy is not None and model.distribute_strategy.num_replicas_in_sync > 1:
        raise ValueError(
            f"'{model.name}' trains on replicas, for which no micro-batch can be found. Find it without a strategy, "
            "for the part of the batch that a replica gets."
        )
    for layer in layers_within(model):
        if couples(layer):
            raise ValueError(
                f"{layer.coupled_because}: its windows keep tensors of all their samples, which no measurement of a "
                "micro-batch shows. Choose `micro_batch_size`, and limit what is kept with "
                '`replace_batchnorm_layers(model, statistics="window", memory=...)`.'
            )
    if effective_batch_size is not None:
        check_count("effective_batch_size", effective_batch_size, "the samples of a window")
    if recompute != "auto" and recompute is not False:
        raise ValueError(f"`recompute` must be 'auto' or False. Received: {recompute!r}")
    if isinstance(margin, bool) or not isinstance(margin, int | float):
        raise TypeError(f"`margin` must be a number. Received: {margin!r}")
    if not 0 <= margin < 1:
        raise ValueError(f"`margin` must be at least 0 and less than 1. Received: {margin}")

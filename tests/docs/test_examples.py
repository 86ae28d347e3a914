"""The examples run as they stand, each in a process of its own, and print the figures that their docstrings promise."""

import ast
import json
import pathlib
import re

import processes
import pytest

EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"
TIME_LIMIT = 600
NUMBER = r"(-?\d+(?:\.\d+)?(?:e[+-]?\d+)?)"


def run(name, *arguments):
    """Runs an example to its end, and returns what it printed."""
    done = processes.run(EXAMPLES / name, *arguments, environment={"CUDA_VISIBLE_DEVICES": ""}, timeout=TIME_LIMIT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def numbers(pattern, text):
    """The numbers at the places of `#` in a pattern, in each of its matches."""
    found = re.findall(re.escape(pattern).replace(r"\#", NUMBER).replace(r"\ ", r"\s+"), text)
    assert found, f"no {pattern!r} in:\n{text}"
    return [tuple(map(float, each if isinstance(each, tuple) else (each,))) for each in found]


def test_each_example_has_a_test():
    tests = pathlib.Path(__file__).read_text()
    assert [path.name for path in EXAMPLES.iterdir() if path.is_file() and path.name not in tests] == []


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_docstrings_say_how_to_run(path):
    assert f"python examples/{path.name}" in ast.get_docstring(ast.parse(path.read_text()))


@pytest.mark.exhaustive
def test_digits_in_fit():
    text = run("digits_in_fit.py")
    (once, _), (split, _) = numbers("loss # test accuracy #", text)
    assert once == pytest.approx(split, rel=1e-2)
    accuracies = [accuracy for _, accuracy in numbers("loss # test accuracy #", text)]
    assert min(accuracies) > 0.95
    assert abs(accuracies[0] - accuracies[1]) < 0.01
    [(apart,)] = numbers("largest difference of the weights: #", text)
    assert apart < 1e-3


def test_custom_loop():
    text = run("custom_loop.py")
    (updates, at_once), (same_updates, in_parts) = numbers("# updates test accuracy #", text)
    assert updates == same_updates
    assert min(at_once, in_parts) > 0.9
    [(apart,)] = numbers("largest difference of the weights: #", text)
    assert apart < 1e-3


@pytest.mark.exhaustive
def test_pretrained_swapped():
    text = run("pretrained_swapped.py")
    plain, swapped = numbers("losses # to #, running variance off by #", text)
    assert swapped[1] < swapped[0]
    assert swapped[2] < 1e-3 < 1 < plain[2]
    [(small, large)] = numbers("a step of 8 images takes # MiB, of 64 # MiB", text)
    assert 4 * small < large


@pytest.mark.exhaustive
def test_text_with_sparse_embeddings():
    text = run("text_with_sparse_embeddings.py")
    plain, window, lazy = numbers("accuracy # # ms an update, which moves # rows", text)
    [(tokens, of_batch)] = numbers("the texts have # different tokens, and the last batch #, in", text)
    assert min(plain[0], window[0], lazy[0]) > 0.8
    assert of_batch == lazy[2] < plain[2] <= tokens
    assert lazy[2] < window[2] <= tokens
    assert lazy[1] < plain[1]


@pytest.mark.exhaustive
def test_language_model_with_recompute():
    text = run("language_model_with_recompute.py")
    (values, first, last), (lora_values, lora_first, lora_last) = numbers("# values trained, loss # to #", text)
    assert last < first
    assert lora_last < lora_first
    assert lora_values < values / 10
    [(kept, recomputed)] = numbers("activations of 64 sequences: # MiB kept, # MiB recomputed", text)
    assert recomputed < kept / 4


@pytest.mark.exhaustive
def test_contrastive():
    text = run("contrastive.py")
    [(apart,)] = numbers("of the full batch and of the window: #", text)
    assert apart < 0.05
    losses = [each[0] for each in numbers("last loss #", text)]
    assert losses[2] < losses[0] - 1  # another loss


@pytest.mark.exhaustive
def test_two_towers():
    (window,), (alone,) = numbers("finds #%", run("two_towers.py"))
    assert window > alone


@pytest.mark.exhaustive
def test_momentum_contrast():
    [(accuracy,)] = numbers("linear probe #", run("momentum_contrast.py"))
    assert accuracy > 0.8


@pytest.mark.exhaustive
def test_multi_worker_on_one_host():
    """Two workers are tests/distribute/test_workers.py's."""
    [(replicas, updates, accuracy)] = numbers("# replicas, # updates, accuracy #", run("multi_worker.py"))
    assert (replicas, updates) == (1, 28)  # of 3 * 38 micro-batches in windows of 4; the last one stays open
    assert accuracy > 0.7


@pytest.mark.exhaustive
def test_notebook():
    """The cells of digits.ipynb run, and print what the notebook shows."""
    notebook = json.loads((EXAMPLES / "digits.ipynb").read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    shown = "".join(
        "".join(output["text"]) for cell in cells for output in cell["outputs"] if output["output_type"] == "stream"
    )
    assert not any(output["output_type"] == "error" for cell in cells for output in cell["outputs"])
    assert sum("image/png" in output.get("data", {}) for cell in cells for output in cell["outputs"]) == 3
    code = "import matplotlib; matplotlib.use('agg')\n" + "\n".join("".join(cell["source"]) for cell in cells)
    done = processes.run(code, timeout=TIME_LIMIT)
    assert done.returncode == 0, done.stderr
    [(apart,)], [(shown_apart,)] = (numbers("differ by #", text) for text in (done.stdout, shown))
    assert apart < 1e-3
    assert shown_apart < 1e-3
    for accuracy, shown_accuracy in zip(
        numbers("updates test accuracy #", done.stdout), numbers("updates test accuracy #", shown), strict=True
    ):
        assert accuracy[0] == pytest.approx(shown_accuracy[0], abs=0.03)

# make demo    trains a small CNN both ways and prints the difference
# make test    runs all checks
# make harden  runs the long versions of the tests behind docs/promises.md, each for MINUTES; PARTS chooses some
# make emulated   compiles the CUDA kernels for a GPU that is emulated on the CPU, for the tests
# make build   compiles the files that have changed
# make wheel   builds a wheel for this machine in dist/, and tests it
# make wheels  builds the wheels to publish, for older systems, CUDA 12 and each TensorFlow, and tests them
# make release builds all that a release publishes, in dist/, and tests it
# make docs    builds the site of docs/ in build/site; warnings are errors. It compiles nothing
# Each target first sets up .venv if needed. PYTHON chooses the interpreter; CMAKE_ARGS and CMAKE_CUDA_ARCHITECTURES are
# passed on.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CPP := $(shell find src -name '*.h' -o -name '*.cc' -o -name '*.cu' -o -name '*.cuh')
export PATH := $(CURDIR)/$(BIN):$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

MINUTES ?= 10
PARTS ?=

.PHONY: demo test harden emulated build check wheel wheels release docs format clean

demo: build
	$(BIN)/accumops demo

# Tests on replicas split the CPU into logical devices, so they have processes of their own; there each file has one
# process, and their order is that of tests/distribute/conftest.py. They run beside all others, since many of them wait for
# other processes, and are shown behind them.
REPLICAS = build/tests_on_replicas.log
test: check emulated
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=20 tests/distribute > $(REPLICAS) 2>&1 & \
	replicas=$$!; status=0; \
	$(BIN)/python -m pytest -n 3 --dist worksteal --durations=20 --ignore=tests/distribute || status=1; \
	wait $$replicas || status=1; \
	cat $(REPLICAS); \
	exit $$status

harden: build
	$(BIN)/python tools/harden.py --minutes $(MINUTES) $(PARTS)

check: build
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CPP)

build: $(VENV)/installed
	$(BIN)/python setup.py --quiet build_ext --inplace

# A build without isolation uses the TensorFlow that is installed in .venv, and compiles only files that have changed.
$(VENV)/installed: pyproject.toml setup.py tools/make_venv.sh
	tools/make_venv.sh $(PYTHON) $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python tools/requirements.py build > $(VENV)/build_requirements.txt
	$(BIN)/python -m pip install --quiet -r $(VENV)/build_requirements.txt
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable '.[dev]'
	touch $@

emulated: $(VENV)/installed
	$(BIN)/cmake -S . -B build/emulated -G Ninja --log-level=WARNING -DACCUMOPS_CUDA=EMULATED \
	  -DPython_EXECUTABLE="$(CURDIR)/$(BIN)/python" -Dpybind11_DIR="$$($(BIN)/python -m pybind11 --cmakedir)"
	$(BIN)/cmake --build build/emulated -- --quiet

wheel:
	$(PYTHON) tools/build_wheels.py

wheels:
	$(PYTHON) tools/build_wheels.py --release

release:
	$(PYTHON) tools/release.py

docs: $(VENV)/docs_installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# The site's reference is read from the sources, so neither TensorFlow nor accumops has to be installed.
$(VENV)/docs_installed: pyproject.toml tools/make_venv.sh tools/requirements.py
	tools/make_venv.sh $(PYTHON) $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python tools/requirements.py docs > $(VENV)/docs_requirements.txt
	$(BIN)/python -m pip install --quiet -r $(VENV)/docs_requirements.txt
	touch $@

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

clean:
	rm -rf build dist accumops/ops/*.so accumops/ops/_build_info.json

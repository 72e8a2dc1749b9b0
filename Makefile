# `make demo` and `make test` need Python, a C++ compiler and make; they install into .venv.
#
#   PYTHON     the interpreter that .venv is made with
#   OFFLINE=1  download nothing: .venv borrows the packages of PYTHON, which must include JAX,
#              scikit-build-core, pybind11 and whatever the target uses
#   CUDA       12 or 13: the CUDA of the JAX that is installed where a GPU is visible
#   TESTS, PYTEST_ARGS, BENCH_ARGS, JOBS, RECORD, RESULTS, COMMIT: see below

PYTHON ?= python3
VENV ?= .venv
CUDA ?= 13
TESTS ?= tests
SMOKE_TESTS ?= test_build.py test_lowering.py test_readme.py test_transforms.py test_validation.py \
               test_sharding.py
# Left out of it: long, and of parts that others reach.
SMOKE_SKIPS ?= test_place_of_sharded_queries or test_sharded_mapped_axis or test_vmap_with_gradients
JOBS ?= 2
RECORD ?= tests/gpu_record.json
RESULTS ?= benchmarks/results
COMMIT ?= $(shell git describe --always --dirty --abbrev=40 --exclude='*' 2>/dev/null || echo unknown)

comma := ,
HAVE_GPU := $(shell nvidia-smi -L >/dev/null 2>&1 && echo yes)
GPU_EXTRA := $(if $(HAVE_GPU),$(comma)cuda$(CUDA))
PY := $(VENV)/bin/python
SOURCES := pyproject.toml CMakeLists.txt $(shell find cuda cmake -type f 2>/dev/null)
# As `make sanitize` installs it.
SANITIZER ?= $(VENV)/lib/python3*/site-packages/nvidia/cu13/bin/compute-sanitizer

.PHONY: demo test test-smoke test-full test-gpu bench-gpu bench-features bench-decode bench-hopper \
        bench-scaling bench-cpu tune tune-here sanitize lint train clean benchmark benchmark_causal \
        benchmark_forward benchmark_backward benchmark_forward_causal benchmark_backward_causal

# A development install serves every target, so a lesser one never replaces it.
DEV := $(VENV)/installed-dev
SMOKE := $(VENV)/installed-test
INSTALLED := $(firstword $(wildcard $(DEV)) $(VENV)/installed-examples)

demo: $(INSTALLED)
	$(PY) examples/train_lm.py --preset demo

train: $(INSTALLED)
	$(PY) examples/train_lm.py

test: $(DEV)
	$(PY) -m pytest -n $(JOBS) $(PYTEST_ARGS) $(TESTS)

# For another Python beside the default one: the wheel, imported from outside the tree.
test-smoke: $(SMOKE)
	cd tests && XLA_FLAGS="--xla_backend_optimization_level=3 $(XLA_FLAGS)" $(abspath $(PY)) -m pytest -n $(JOBS) -k "not ($(SMOKE_SKIPS))" $(PYTEST_ARGS) $(SMOKE_TESTS)

test-full: $(DEV)
	$(PY) -m pytest -n $(JOBS) --full $(PYTEST_ARGS) $(TESTS)

test-gpu: $(DEV)
	$(PY) -c "import jax, jax_cosine_attn as j; c = j.show_config(); \
	    assert jax.default_backend() == 'gpu' and j.has_cuda_kernels(), 'no GPU or no kernels'"
	$(PY) -m pytest -p no:benchmark -n $(JOBS) --dist worksteal --junitxml=build/test-gpu.xml $(PYTEST_ARGS) $(TESTS); \
	status=$$?; \
	$(PY) tests/gpu_record.py write build/test-gpu.xml --commit $(COMMIT) --record $(RECORD); \
	exit $$status

BENCH = $(PY) benchmarks/bench_attention.py $(BENCH_ARGS)
bench-gpu: $(DEV)
	for options in "" "--causal"; do \
	    for preset in "original" "original --dtype float32" "tokens16k"; do \
	        name=$$(echo $$preset $$options | tr -d - | tr -s ' ' -); \
	        $(BENCH) --preset $$preset $$options --commit $(COMMIT) \
	            --json $(RESULTS)/$$name.json || exit 1; \
	    done; \
	done

bench-features: $(DEV)
	$(PY) benchmarks/bench_features.py --commit $(COMMIT) --json $(RESULTS)/features.json

bench-decode: $(DEV)
	$(PY) benchmarks/bench_decode.py --commit $(COMMIT) --json $(RESULTS)/decode.json

# One file: what both passes in one are to reach depends on each of them. In parts with BENCH_ARGS,
# say "--seq-lens 512 1024", and COMMIT, because results in the tree make git call it dirty.
bench-hopper: $(DEV)
	for name in hopper-forward hopper-backward; do \
	    $(BENCH) --preset $$name --num-times 5 --runs 3 --commit $(COMMIT) \
	        --json $(RESULTS)/hopper.json || exit 1; \
	done

bench-scaling: $(DEV)
	$(PY) benchmarks/bench_scaling.py --commit $(COMMIT) --json $(RESULTS)/scaling.json

# The tiles that are tried beside the shipped ones take an installation of their own.
tune: export JAX_COSINE_ATTN_TUNE = ON
tune:
	$(MAKE) VENV=$(VENV)-tune tune-here

tune-here: $(SMOKE)
	$(PY) benchmarks/tune.py --commit $(COMMIT) --json $(RESULTS)/tune.json

bench-cpu: $(DEV)
	JAX_PLATFORMS=cpu $(PY) benchmarks/bench_cpu.py

benchmark: $(DEV)
	$(BENCH)
benchmark_causal: $(DEV)
	$(BENCH) --causal
benchmark_forward: $(DEV)
	$(BENCH) --only-forwards
benchmark_backward: $(DEV)
	$(BENCH) --only-backwards
benchmark_forward_causal: $(DEV)
	$(BENCH) --only-forwards --causal
benchmark_backward_causal: $(DEV)
	$(BENCH) --only-backwards --causal

# Each buffer is its own allocation, so that memcheck sees where it ends.
sanitize: export XLA_PYTHON_CLIENT_ALLOCATOR = platform
# Autotuning under a sanitizer takes minutes, and has crashed.
sanitize: export XLA_FLAGS += --xla_gpu_autotune_level=0
# Racecheck 2025.3, of CUDA 13.0, takes a stage that is filled again for a race; 2026.4 does not.
sanitize: $(DEV)
ifndef OFFLINE
	$(PY) -m pip install "nvidia-cuda-sanitizer-api>=13.5"
endif
	for tool in memcheck racecheck; do \
	    seq 0 $$(($(JOBS) - 1)) | xargs -P $(JOBS) -I {} \
	        $(SANITIZER) --tool $$tool --error-exitcode 1 $(PY) tests/sanitize.py {} $(JOBS) || exit 1; \
	done

lint: $(DEV)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

clean:
	rm -rf build dist .cache .venv*

# Kernels are compiled for the tests where nvcc is, for the demo only if they can run here too.
ifndef HAVE_GPU
$(VENV)/installed-examples: export JAX_COSINE_ATTN_CUDA = OFF
endif
# The smoke set imports the wheel, every other target the tree.
EDITABLE := -e
$(SMOKE): EDITABLE :=
$(SMOKE): $(shell find jax_cosine_attn -name '*.py*' -not -path '*/__pycache__/*')

# The stem is the extra: dev, test, examples.
$(VENV)/installed-%: $(SOURCES) | $(PY)
	rm -f $(VENV)/installed-*
ifdef OFFLINE
	$(PY) -m pip install --no-build-isolation --no-deps --no-index $(EDITABLE) .
else
	$(PY) -m pip install $(EDITABLE) ".[$*$(GPU_EXTRA)]"
endif
	touch $@

$(PY):
ifdef OFFLINE
	$(PYTHON) -m venv --without-pip $(VENV)
	$(PYTHON) -c "import site; print(*(f'import site; site.addsitedir({path!r})' \
	    for path in site.getsitepackages()), sep='\n')" \
	    > "$$($(PY) -c "import sysconfig; print(sysconfig.get_path('purelib'))")/borrowed.pth"
else
	$(PYTHON) -m venv $(VENV)
endif

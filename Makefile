# make demo   train, evaluate and look, on any machine      make bench       speed, beside others
# make test   lint and tests                                make test-long   what takes too long for each change
# make lines  how long each file is: from 500 on, one looks for a second concept in it

PYTHON ?= python3
export OMP_WAIT_POLICY ?= PASSIVE  # threads that wait leave the core to the processes that prepare images

demo: .venv/ready .venv/built
	.venv/bin/python demo.py

test: .venv/ready-test .venv/built
	.venv/bin/ruff check .
	.venv/bin/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile

test-long: .venv/ready-test .venv/built
	.venv/bin/python -m pytest -q -m long

lines:
	wc -l *.py engine/*.py tasks/*.py sets/*.py decoders/*.py csrc/* | sort -n

bench: .venv/ready-test .venv/built
	.venv/bin/python bench.py

# on a machine with a GPU, in this order, each under eight minutes: PYTHON as it is, nothing is installed; OUT takes the
# JSON and the tables for LOG.md. DRY=1 rehearses a call on a CPU. MORE="--data PHOTOS --size s --minutes 9": bench.py --help
OUT ?= build/gpu
GPU = $(PYTHON) bench.py $@ --out $(OUT) $(if $(DRY),--dry) $(MORE)

gpu-build:
	$(GPU)

gpu-test gpu-bench-1 gpu-bench-2 gpu-bench-3 gpu-bench-4 gpu-bench-5: $(if $(DRY),,build/gpu/built)
	$(subst gpu-bench,gpu,$(GPU))

build/gpu/built: setup.py $(wildcard csrc/*)
	$(PYTHON) bench.py gpu-build --out $(OUT)
	mkdir -p build/gpu && touch $@

# an own environment, made once, and again only when the dependencies change
.venv/ready: pyproject.toml
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -e ".[demo]"
	touch $@

.venv/ready-test: .venv/ready
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -e ".[test]"
	touch $@

# csrc/ for what the machine has: CPU, CUDA, or nothing without a compiler
.venv/built: setup.py $(wildcard csrc/*) .venv/ready
	.venv/bin/python setup.py --quiet build_ext --inplace > .venv/build.log 2>&1 || (cat .venv/build.log; false)
	grep csrc: .venv/build.log
	touch $@

.PHONY: demo test test-long lines bench gpu-build gpu-test gpu-bench-1 gpu-bench-2 gpu-bench-3 gpu-bench-4 gpu-bench-5

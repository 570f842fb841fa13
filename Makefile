# make demo   train, evaluate and look, on any machine      make test   lint and tests      make bench   speed, beside others

PYTHON ?= python3
export OMP_WAIT_POLICY ?= PASSIVE  # threads that wait leave the core to the processes that prepare images

demo: .venv/ready .venv/built
	.venv/bin/python demo.py

test: .venv/ready-test .venv/built
	.venv/bin/ruff check .
	.venv/bin/python -m pytest -q

bench: .venv/ready-test .venv/built
	.venv/bin/python bench.py

# one call on a machine with a GPU: the kernels' tests there, also under compute-sanitizer, and every op beside the others
bench-gpu: .venv/ready-test .venv/built
	.venv/bin/python -m pytest -q -rs tests/test_ops.py tests/test_ops_attention.py
	! command -v compute-sanitizer || compute-sanitizer --error-exitcode 1 \
		.venv/bin/python -m pytest -q tests/test_ops.py tests/test_ops_attention.py -k "cuda and not compile"
	.venv/bin/python bench.py sinkhorn loss attention

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

.PHONY: demo test bench bench-gpu

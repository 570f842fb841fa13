# make demo   train, evaluate and look, on any machine      make test   lint and tests      make bench   speed, beside others

PYTHON ?= python3
export OMP_WAIT_POLICY ?= PASSIVE  # threads that wait leave the core to the processes that prepare images

demo: .venv/ready
	.venv/bin/python demo.py

test: .venv/ready-test
	.venv/bin/ruff check .
	.venv/bin/python -m pytest -q

bench: .venv/ready-test
	.venv/bin/python bench.py

# an own environment, made once, and again only when the dependencies change
.venv/ready: pyproject.toml
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -e ".[demo]"
	touch $@

.venv/ready-test: .venv/ready
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -e ".[test]"
	touch $@

.PHONY: demo test bench

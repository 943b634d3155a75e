# The two commands: `make run` and `make test`. `make help` lists the rest.
PYTHON ?= python3
CONFIG ?= config.toml
VENV := .venv
# The check's own tools want one fixed Python; any that is there will do.
CHECK := .venv-check

.PHONY: help run venv install uninstall deb test test-vm test-systemd test-gpu check docs format bench bench-quick bench-gpu soak train-demo clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

run: $(VENV)/.installed  ## install into .venv and run the agent (CONFIG=config.toml)
	@exec $(VENV)/bin/edge-agent run --config $(CONFIG)

venv: $(VENV)/.installed  ## install into .venv and do no more

$(VENV)/.installed: pyproject.toml tools/venv.sh
	@tools/venv.sh $(VENV) onnx,opencv,demo $(PYTHON)

install:  ## install as a service (PREFIX=/usr/local DESTDIR= …: tools/install.sh), without starting it
	@PYTHON=$(PYTHON) tools/install.sh install

uninstall:  ## take that away; configuration and state stay (PURGE=1: they go too)
	@tools/install.sh uninstall

deb:  ## a Debian package with all that it needs in it, for the Python of this system
	@tools/build_deb.sh

test:  ## all tests that need no GPU, under every Python from 3.10 to 3.13 that is here
	@tools/test-packages.sh
	@tools/test.sh

test-vm:  ## V4L2 against a real driver, in a virtual machine; as root
	@python3 tests/vm/run.py

test-systemd:  ## the Debian package under a real systemd, in a container and with a camera in a virtual machine; as root
	@python3 tests/vm/systemd.py
	@python3 tests/vm/systemd_machine.py

test-gpu: .venv-gpu/.installed  ## TensorRT and the CUDA kernels on a real GPU (TensorRT from JetPack, or in .venv-gpu)
	.venv-gpu/bin/python -m pytest tests/gpu

.venv-gpu/.installed: pyproject.toml tools/venv.sh
	@tools/venv.sh .venv-gpu test,cuda,convert $(PYTHON)

check: $(CHECK)/.installed  ## format, lint, types, layers, generated documents
	$(CHECK)/bin/ruff format --check .
	$(CHECK)/bin/ruff check .
	$(CHECK)/bin/mypy
	$(CHECK)/bin/lint-imports
	$(CHECK)/bin/python -m generate_docs --check

$(CHECK)/.installed: pyproject.toml tools/venv.sh
	@tools/venv.sh $(CHECK) dev "$$(tools/pythons.sh | sed -n 's/^3.12 //p' | grep . || echo $(PYTHON))"

docs: $(CHECK)/.installed  ## write the generated documents
	$(CHECK)/bin/python -m generate_docs

format: $(CHECK)/.installed  ## put the code into its format
	$(CHECK)/bin/ruff format .
	$(CHECK)/bin/ruff check --fix .

BENCH := .venv-bench/bin/python
RESULTS := benchmarks/results
# Of what `make bench` measures; `soak` and `gpu` are commands of their own.
MEASURED := line framework overload latency capture mqtt decode swap startup

bench: .venv-bench/.installed  ## everything beside its reference, into docs/performance.md (more than an hour; nothing else may run)
	@for name in $(MEASURED); do \
	    $(BENCH) -m benchmarks.$$name $$([ $$name = line ] && echo --rivals) --json $(RESULTS)/$$name.json || echo "$$name: see above"; \
	done
	$(BENCH) -m benchmarks.report

bench-quick: .venv-bench/.installed  ## two minutes: whether anything is worse than its bar by more than the noise
	$(BENCH) -m benchmarks.quick

.venv-bench/.installed: pyproject.toml tools/venv.sh
	@tools/test-packages.sh
	@tools/venv.sh .venv-bench bench $(PYTHON)
	@$(BENCH) -m pip install -q --no-deps rtmlib==0.0.16 supervision==0.31.2  # they want another OpenCV
	@touch $@

soak: .venv-bench/.installed  ## whether anything grows while all that can fail does (MINUTES=10, to days)
	$(BENCH) -m benchmarks.soak --minutes $(or $(MINUTES),10) --json $(RESULTS)/soak.json

bench-gpu: .venv-gpu/.installed  ## the line on the GPU beside the bare engine
	.venv-gpu/bin/python -m benchmarks.gpu --json $(RESULTS)/gpu.json

train-demo:  ## train the bundled models again (PyTorch on the CPU, about two hours)
	@tools/venv.sh .venv-train train $(PYTHON)
	.venv-train/bin/python -m train_demo

clean:  ## remove what was made here
	rm -rf .venv .venv-* benchmarks/out build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

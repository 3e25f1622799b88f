# `make` lists the targets. All of them set up first: they need Python 3.11 or newer, git and make.
# What they install is locked in uv.lock and lives in .venv; when that is up to date, setting up takes a tenth of a second.

# A uv on PATH that works and is as new as pyproject.toml asks, else our own in .uv.
UV := $(shell uv cache dir >/dev/null 2>&1 && command -v uv || echo .uv/bin/uv)
# Most of a test is compilation, which one core does: two processes take two thirds of the time of one.
TESTS = pytest --numprocesses 2 --dist worksteal
# CUDA 13, which JAX and Warp are locked for, needs NVIDIA's driver R580.
DRIVER := $(shell nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | sed -n '1s/^\([0-9]*\)\..*/\1/p')
CUDA := $(shell [ "$(DRIVER)" -ge 580 ] 2>/dev/null && echo --extra cuda)
ifneq ($(DRIVER),)
ifeq ($(CUDA),)
$(warning The NVIDIA driver R$(DRIVER) is older than R580, which CUDA 13 needs: everything will run on the CPU)
endif
endif
RUN = $(UV) run --locked $(CUDA)
ARGS =

.PHONY: help
help:  ## List the targets.
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-9s %s\n", $$1, $$2}' Makefile

.PHONY: train
train: | $(UV)  ## Train with the preset for this machine; flags in ARGS="--total-timesteps 50000".
	$(RUN) train.py $(ARGS)

.PHONY: eval
eval: | $(UV)  ## Judge a policy in gym_aloha; flags in ARGS="--model-path runs/insertion".
	$(RUN) eval.py $(ARGS)

.PHONY: test
test: | $(UV)  ## Run the tests that are not marked slow; pytest's flags in ARGS.
	$(RUN) $(TESTS) -m "not slow" $(ARGS)

.PHONY: test-all
test-all: | $(UV)  ## Run every test.
	$(RUN) $(TESTS) $(ARGS)

.PHONY: bench
bench: | $(UV)  ## Measure steps per second; flags in ARGS="--engine mjx --renderer warp --worlds 1024".
	$(RUN) -m benchmarks.throughput $(ARGS)

.PHONY: format
format: | $(UV)  ## Format the code and apply the linter's safe fixes.
	$(RUN) ruff check --fix-only .
	$(RUN) ruff format .

.PHONY: check
check: | $(UV)  ## Check format, lint and types; changes nothing.
	$(RUN) ruff format --check .
	$(RUN) ruff check .
	$(RUN) mypy

.PHONY: lock
lock: | $(UV)  ## Write uv.lock and requirements.txt anew after pyproject.toml changed; ARGS=--upgrade for newer versions.
	$(UV) lock $(ARGS)
	$(UV) export --locked --no-dev --no-emit-project --no-hashes --no-annotate --quiet --output-file requirements.txt

.uv/bin/uv:
	@python=$$(for p in python3 python3.13 python3.12 python3.11; do \
	    $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done); \
	if [ -z "$$python" ]; then echo "Python 3.11 or newer is needed and none was found: install it, or uv." >&2; exit 2; fi; \
	if ! $$python -m venv --clear .uv >/dev/null 2>&1; then \
	    echo "'$$python -m venv .uv' failed: install its venv module (Debian, Ubuntu: apt install python3-venv), or uv." >&2; exit 2; fi
	.uv/bin/python -m pip install --quiet 'uv>=0.8'

# `make demo` and `make test` need Python 3.10-3.13 and, for the C++ part, a C++17 compiler; they set up .venv first.

PYTHON ?= python3
# One exact version, so that everybody tests the same; for another build of PyTorch: make TORCH='torch>=2.9'
TORCH  ?= torch==2.13.0
VENV   ?= .venv

BIN      := $(VENV)/bin
STAMP    := $(VENV)/.installed
# A process per core, at most 8; one that has no test left takes over half of what another still has.
PARALLEL := -n auto --maxprocesses 8 --dist worksteal
# Most mistakes show in one of these: imports and public names, graphs and plans as text, the rules of
# the planner, every kind of path against float64, the engine's steps, and what files hold.
CHECKED  := $(addprefix tests/test_,layout.py public_api.py ops.py capture.py plans.py plan.py \
            evaluate.py native_graph.py paths.py state.py result.py)
# Tests that build the extension again take its object files from tests/compiled.py.
COMPILER := $(if $(filter default,$(origin CXX)),CXX=$(CURDIR)/tests/compiled.py)
SOURCES  := pyproject.toml setup.py $(shell find csrc -type f 2>/dev/null)

.DEFAULT_GOAL := help
.PHONY: help demo test check lint bench peers fuzz sweep proofs kernel-report dev sanitize clean

help: ## this list
	@grep -E '^[a-z-]+: .*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+): .*## /  make \1\t/' | expand -t 24

demo: $(STAMP) ## the loss barrier between two small networks, in seconds, with no files needed
	@$(BIN)/modeconn demo

test: lint ## all checks: ruff, mypy, and every test, among them a wheel used from a clean environment
	$(BIN)/pytest -q $(PARALLEL)

check: lint ## while editing: ruff, mypy, and the tests of what holds the stages together, in about a minute
	$(BIN)/pytest -q $(PARALLEL) -m "not slow" $(CHECKED)

lint: $(STAMP) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/mypy modeconn kernels

bench: $(STAMP) ## the side-by-side table: this library against a pass per point and other peers
	$(BIN)/python bench/run.py

proofs: $(STAMP) ## the tests that take minutes
	$(BIN)/pytest -q -m proof

kernel-report: $(STAMP) ## compile the GPU kernels, without a GPU; what they take of one goes into docs/kernels.md
	env -u TRITON_INTERPRET $(BIN)/python bench/kernel_report.py --write docs/kernels.md

# What drop-ins stand in for or serve, on top of what .venv has, each without what it requires: that
# would install another PyTorch. topopy, of landscaper's, was built for NumPy 1.
PEERS    := .venv-peers
PACKAGES := loss-landscapes==3.0.6 curvlinops-for-pytorch==3.0.1 backpack-for-pytorch==1.7.1 einconv==0.1.0 \
            einops==0.8.2 linear_operator==0.6.1 opt-einsum==3.4.0 unfoldNd==0.2.3 \
            landscaper==1.3.1 topopy==1.0.4 nglpy==1.1.7 gudhi==3.13.0 numpy==1.26.4 coloraide drawsvg treelib pyDOE six \
            lightning==2.6.6 lightning-utilities torchmetrics accelerate psutil h5py
peers: $(STAMP) ## the drop-ins against the real packages, in an environment of their own (.venv-peers)
	@test -x $(PEERS)/bin/python || $(BIN)/python -m venv $(PEERS)
	@$(PEERS)/bin/python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])' > $(PEERS)/place
	@$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_paths()["purelib"])' \
	    > "$$(cat $(PEERS)/place)/modeconn-peers.pth"
	@for package in $(PACKAGES); do \
	    $(PEERS)/bin/python -m pip install --quiet --no-deps $$package \
	        || echo "$$package cannot be installed here: tests that need it are skipped"; \
	done
	$(PEERS)/bin/python -m pytest -q -rs tests/peers tests/test_pieces.py tests/test_goldstein.py

MINUTES ?= 60
fuzz: $(STAMP) ## random networks, paths, data and losses against plain float64, for MINUTES (60)
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz/run.py --minutes $(MINUTES) --first $$(date +%s)

sweep: $(STAMP) ## networks of each kind that is installed, against plain float64; at most ten minutes
	OMP_NUM_THREADS=1 $(BIN)/python bench/sweep.py --minutes 10 --write docs/models.md

dev: $(STAMP) ## only set up .venv, with modeconn in it (editable)

sanitize: $(STAMP) ## the C++ engine under the address, undefined-behaviour and thread sanitizers (gcc); some minutes
	$(BIN)/python tests/sanitize.py

clean: ## remove .venv, build products and caches: all that git does not know
	rm -rf $(VENV) $(PEERS) build dist .cache .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache *.egg-info
	rm -f modeconn/_native*.so modeconn/_cuda*.so modeconn/_native_missing.txt modeconn/_cuda_missing.txt
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Installed again when the packaging or the C++ sources change; the Python sources are used in place.
$(STAMP): $(SOURCES)
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; (3, 10) <= v or sys.exit("modeconn needs Python 3.10 or later; $(PYTHON) is %d.%d (make PYTHON=...)" % v); v <= (3, 13) or print("note: modeconn is tested with Python 3.10 to 3.13; $(PYTHON) is %d.%d" % v)'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing $(TORCH) into $(VENV)"
	@$(BIN)/python -m pip install "$(TORCH)"
	@echo "Building modeconn and installing it with its tools into $(VENV) (details: $(VENV)/install.log)"
	@$(COMPILER) $(BIN)/python -m pip install -v --editable '.[dev]' > $(VENV)/install.log 2>&1 \
	    || { tail -n 40 $(VENV)/install.log; exit 1; }
	@grep -aE '^ *(✓|✗)' $(VENV)/install.log | sort -u || true
	@touch $@

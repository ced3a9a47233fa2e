PYTHON ?= python3
VENV   ?= .venv
EXTRAS ?= cloud,edge-torch,postgres,s3,dev
# Test files side by side; most of them wait for processes and sockets.
JOBS   ?= 3
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
NATIVE := $(VENV)/.compiled

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-sanitizers test-rivals test-faults test-containers lint format proto docs bench migration wheel wheels clean

help:  ## Show this list.
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sort | awk -F ':.*## ' '{printf "  make %-16s %s\n", $$1, $$2}'

$(STAMP): pyproject.toml constraints.txt tools/setup.sh
	@PYTHON=$(PYTHON) VENV=$(VENV) EXTRAS=$(EXTRAS) sh tools/setup.sh
	@touch $@

$(NATIVE): $(STAMP) hatch_build.py $(wildcard common/ebbflow/common/codes/native/*.c edge/ebbflow/edge/engine/kernels/*.[ch])
	@$(BIN)/python hatch_build.py
	@touch $@

demo: $(NATIVE)  ## Run the whole loop on this machine: a cloud, three agents, 180 users. KEEP=1 leaves it running.
	@cd deploy && ../$(BIN)/python -m demo --folder "$(CURDIR)/demo-run" $(if $(KEEP),--keep) $(ARGS)

test: $(NATIVE)  ## Run the tests. ARGS="-k name" chooses.
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(ARGS)

test-containers: $(NATIVE)  ## Build and run the container images; needs root, buildah and mmdebstrap.
	$(BIN)/python -m pytest -m containers --timeout=3600 $(ARGS)

test-faults: $(NATIVE)  ## Kill real processes by the hundred, for half an hour. COUNT=50 and SEED=7 choose.
	COUNT="$(COUNT)" SEED="$(SEED)" $(BIN)/python -m pytest -m faults --timeout=3600 $(ARGS)

test-rivals: $(NATIVE)  ## Let llama.cpp and ONNX Runtime GenAI run what is exported; builds them first. Needs a C++ compiler.
	$(BIN)/python -m pytest -m rivals --timeout=3600 $(ARGS)

test-slow: $(NATIVE)  ## Run the tests that take long.
	$(BIN)/python -m pytest -m "slow and not sanitizers" -n 2 --dist loadfile -v $(ARGS)

lint: $(NATIVE)  ## Check style, types, the contract, and that generated files are current.
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/buf lint
	$(BIN)/buf format --diff --exit-code
	$(BIN)/python tools/genproto.py --check
	$(BIN)/python tools/gendocs.py --check

format: $(NATIVE)  ## Bring code and protos into the house style.
	$(BIN)/ruff check --fix-only --quiet
	$(BIN)/ruff format --quiet
	$(BIN)/buf format --write

proto: $(NATIVE)  ## Regenerate common/ebbflow/api from protos/.
	$(BIN)/python tools/genproto.py

docs: $(NATIVE)  ## Regenerate the generated pages of docs/reference.
	$(BIN)/python tools/gendocs.py

bench: $(NATIVE)  ## Run one benchmark: make bench NAME=footprint.
	@test -n "$(NAME)" || { echo 'say which: make bench NAME=...'; ls tests/benchmarks/bench_*.py; exit 2; }
	$(BIN)/python tests/benchmarks/bench_$(subst -,_,$(NAME)).py $(ARGS)

migration: $(NATIVE)  ## Write a migration for a change of the tables: make migration NAME="add x".
	@test -n "$(NAME)" || { echo 'say what it does: make migration NAME="add x"'; exit 2; }
	$(BIN)/python tools/newmigration.py "$(NAME)"

wheel: $(NATIVE)  ## Build the wheel and try it from an empty folder.
	sh tools/trywheel.sh "$(BIN)/python"

wheels: $(NATIVE)  ## Build wheels for x86-64 and aarch64 into dist/, with the compiler of the wheel ziglang.
	sh tools/wheels.sh "$(CURDIR)/$(BIN)/python" dist

test-sanitizers: $(NATIVE)  ## Run the kernels under sanitizers, other compilers and, in qemu-user, on Arm.
	$(BIN)/python -m pytest -m slow --timeout=3600 tests/unit/engine/test_kernels_elsewhere.py $(ARGS)

clean:  ## Remove the virtual environment and what runs have left.
	rm -rf $(VENV) demo-run dist

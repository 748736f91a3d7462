# `make demo` and `make test` set up all they need in .venv; nothing else has to be installed before.
PYTHON ?= python3
PROMPT ?= a red apple
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

.PHONY: demo test test-full lint bench gpu-first gpu-rehearsal gpu-test gpu-bench

demo: $(VENV)/base
	$(BIN)/fastldm generate "$(PROMPT)" --seed 0 -o demo.png --force
	@$(BIN)/python -c "from PIL import Image; im = Image.open('demo.png'); \
	im.resize((im.width * 8, im.height * 8), Image.Resampling.BICUBIC).save('demo-large.png')"
	@echo "demo.png is the picture, demo-large.png the same enlarged 8 times"

test: $(VENV)/test
	$(PYTEST) -m "not full"

test-full: $(VENV)/full
	$(PYTEST)

lint: $(VENV)/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# On a CPU, in under 20 minutes: fastldm and its peers, and their history as a page.
bench: $(VENV)/bench
	$(BIN)/python -m benchmarks.suite

# On a machine with a GPU, with the torch and triton that it has. What has to be learnt first, in two halves of six
# minutes: `make gpu-first OUT=DIR HALF=1`, then `make gpu-first OUT=DIR2 HALF=2 RESUME=DIR`; without HALF both.
OUT ?= benchmarks/runs/first
gpu-first:
	$(PYTHON) -m benchmarks.gpu first --out $(OUT) $(if $(HALF),--half $(HALF)) $(if $(RESUME),--resume $(RESUME))

# The same on a CPU: every stage, on tiny shapes, without the packages that such a machine lacks.
gpu-rehearsal: $(VENV)/test
	$(BIN)/python -m benchmarks.gpu first --dry --out $(OUT)-rehearsal --resume $(OUT)-rehearsal

gpu-test:
	$(PYTHON) -m benchmarks.gpu test

gpu-bench:
	$(PYTHON) -m benchmarks.gpu bench

$(VENV)/base: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e .
	@touch $@

$(VENV)/test: $(VENV)/base
	$(PIP) -e ".[test,ray]"
	@touch $@

$(VENV)/bench: $(VENV)/test
	$(PIP) -e ".[bench]"
	@touch $@

$(VENV)/full: $(VENV)/bench
	$(PIP) kubernetes-validate
	$(PIP) --no-deps k-diffusion==0.1.1.post1  # its samplers alone, which judge ours
	$(PIP) torchsde==0.2.6
	@touch $@

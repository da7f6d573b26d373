# Every target does all its own set-up. Variables: VENV (.venv), PYTHON (python3), ARGS (passed on).
VENV ?= .venv
PYTHON ?= python3
ARGS ?=
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 1
export MKL_NUM_THREADS ?= 1

.PHONY: help quick test test-full test-real lint versions measure docs speed clean
.DEFAULT_GOAL := help

help: ## show this
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

$(VENV)/.installed: setup.cfg pyproject.toml
	@echo "Setting up $(VENV): downloads about 3 GB of packages (torch and its CUDA libraries, torchvision, timm, pandas," >&2
	@echo "pyarrow, matplotlib, scikit-learn) which take about 6 GB on disk. No data set is downloaded." >&2
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e . >&2
	@touch $@

$(VENV)/.dev: $(VENV)/.installed
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]' >&2
	@touch $@

quick: $(VENV)/.installed ## train backdoors on digits, defend, measure, open the page it names (about 6 minutes)
	@$(BIN)/sleeperbench run quick --out runs/quick $(ARGS)

# Compiled modules are kept, whatever the environment says: otherwise each of about a hundred processes
# compiles them anew.
test: $(VENV)/.dev ## the tests, without real data sets
	@PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n 4 --dist loadfile --no-loadscope-reorder \
	    -m "not real and not gpu" --durations=30 $(ARGS)

test-full: $(VENV)/.dev ## `sleeperbench check --full` of every built-in method, on two processes
	@SLEEPERBENCH_FULL=1 $(BIN)/python -m pytest -n 2 --dist loadgroup --durations=30 tests/contracts/test_registry_checks.py $(ARGS)

test-real: $(VENV)/.dev ## the tests on the data sets under SLEEPERBENCH_DATA
	@test -n "$$SLEEPERBENCH_DATA" || { echo "set SLEEPERBENCH_DATA to a folder of data sets, see docs/data.md" >&2; exit 2; }
	@$(BIN)/python -m pytest -m real $(ARGS)

lint: $(VENV)/.dev ## ruff and mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@rm -rf build/typed
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target build/typed . >&2
	@MYPYPATH=build/typed $(BIN)/mypy --config-file pyproject.toml -p sleeperbench

versions: $(VENV)/.installed ## fail when a method's code changed and its version did not; ARGS=--write enters new ones
	@$(BIN)/python tests/versions.py $(ARGS)

measure: $(VENV)/.installed ## a method's figures on real data, beside the published ones: METHOD=defense/ft (needs SLEEPERBENCH_DATA)
	@test -n "$(METHOD)" || { echo "name a method: make measure METHOD=defense/ft" >&2; exit 2; }
	@$(BIN)/python docs/measure.py $(METHOD) $(ARGS)

docs: $(VENV)/.installed ## renew the generated parts of README.md and docs/; with ARGS=--check only compare
	@$(BIN)/python docs/generate.py $(ARGS)

speed: $(VENV)/.installed ## measure the ratios that the documentation quotes
	@for s in $(filter-out speed/single_images.py,$(wildcard speed/*.py)); do echo "== $$s"; $(BIN)/python $$s || exit 1; done

clean: ## remove what make built, not runs and stores
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache

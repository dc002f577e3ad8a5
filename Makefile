# From a bare clone: needs python3 (3.10 or later) and, for the compiled kernels, a C++ compiler.
#   make demo   train the embedded GRPO demo        make test   run the test suite
#   make lint   ruff, check and format              make clean  remove build products (and VENV with `distclean`)
PYTHON ?= python3
VENV   ?= .venv
# The release that the suite is run against; a CUDA build or a newer one: make TORCH=... VENV=.venv-other
TORCH  ?= torch==2.13.0

BIN     := $(VENV)/bin
PIP     := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# Python files are used where they lie; the package is installed again only when these change.
SOURCES := pyproject.toml CMakeLists.txt $(shell find csrc -type f)

.PHONY: demo test lint clean distclean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed-train
	$(BIN)/rlhf-fast demo grpo

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest tests

lint: $(VENV)/.ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

$(VENV)/.created:
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.torch: | $(VENV)/.created
	$(PIP) "$(TORCH)"
	touch $@

# One rule for every set of extras.
$(VENV)/.installed-%: $(SOURCES) | $(VENV)/.torch
	$(PIP) --editable ".[$*]"
	touch $@

$(VENV)/.ruff: pyproject.toml | $(VENV)/.created
	$(PIP) "ruff~=0.17.0"
	touch $@

clean:
	rm -rf build dist .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)

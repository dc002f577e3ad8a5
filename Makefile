# From a bare clone: needs python3 (3.10 or later) and, for the compiled kernels, a C++ compiler.
#   make demo   train the embedded GRPO demo        make test   run the test suite
#   make sanitize   the tests of the C++ kernels under AddressSanitizer and UBSan (minutes)
#   make lint   ruff, check and format              make clean  remove build products (and VENV with `distclean`)
PYTHON ?= python3
VENV   ?= .venv
# The release that the suite is run against; a CUDA build or a newer one: make TORCH=... VENV=.venv-other
TORCH  ?= torch==2.13.0

BIN     := $(VENV)/bin
PIP     := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# Python files are used where they lie; the package is installed again only when these change.
SOURCES := pyproject.toml CMakeLists.txt $(shell find csrc -type f)

.PHONY: demo test sanitize lint clean distclean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed-train
	$(BIN)/rlhf-fast demo grpo

test: $(VENV)/.installed-test $(VENV)/.hosts $(VENV)/.deepspeed
	$(BIN)/python -m pytest tests

# Both libraries must be in the process before Python: it is not built with them.
SANITIZED  := row_pass_cpp policy_cpp kl divergence_rows value advantages ppo_advantages fuzz_ops
SANITIZERS := LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
              ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1
sanitize: $(VENV)/.installed-test
	cmake -S . -B build/sanitize -DRLHF_FAST_SANITIZE=ON -DRLHF_FAST_CUDA=off -DCMAKE_CXX_FLAGS=-O1 \
	    -Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir) -DPython_EXECUTABLE=$(abspath $(BIN)/python)
	cmake --build build/sanitize --parallel
	$(SANITIZERS) $(BIN)/python tests/sanitized.py build/sanitize/_C*.so -q -p no:cacheprovider \
	    -k "not triton" $(SANITIZED:%=tests/test_%.py)

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
$(VENV)/.installed-%: $(SOURCES) constraints.txt | $(VENV)/.torch
	$(PIP) --constraint constraints.txt --editable ".[$*]"
	touch $@

# Sources of the integrations' hosts. Their wheels are named as for one Python and platform (one of them exists for no
# other), whatever runs here. Without a network their tests are skipped, and the next `make test` tries again.
$(VENV)/.hosts: tests/hosts.txt | $(VENV)/.created
	rm -rf $(VENV)/hosts
	if $(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
	        --python-version 3.11 --platform manylinux1_x86_64 --dest $(VENV)/hosts/wheels -r tests/hosts.txt && \
	   for wheel in $(VENV)/hosts/wheels/*.whl; do $(BIN)/python -m zipfile -e $$wheel $(VENV)/hosts || exit 1; done; \
	then touch $@; else echo "tests/hosts.txt could not be fetched: the tests of these hosts are skipped"; fi

# DeepSpeed for tests/test_deepspeed.py, in a folder of its own: other packages change where they can import it. Without
# its compiled ops, none of which is needed, it is built in seconds; where it cannot be, its tests are skipped.
$(VENV)/.deepspeed: tests/deepspeed.txt | $(VENV)/.torch
	rm -rf $(VENV)/deepspeed
	if DS_BUILD_OPS=0 $(PIP) --no-deps --target $(VENV)/deepspeed -r tests/deepspeed.txt; then touch $@; \
	else echo "tests/deepspeed.txt could not be installed: the tests of DeepSpeed are skipped"; fi

$(VENV)/.ruff: pyproject.toml | $(VENV)/.created
	$(PIP) "ruff~=0.17.0"
	touch $@

clean:
	rm -rf build dist .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)

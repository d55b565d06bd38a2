# make quickstart   train a small hybrid model on 2 ranks, on this machine's CPU
# make test         the suite                          make test-slow   the rest of it
# make lint         style, types and the rooms' rules  make clean       forget the virtual environment
#
# Each makes .venv when it must, with PYTHON (python3 by default; 3.11 or later) and pip as they are configured here.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

# DeepSpeed's own CUDA operators are not used: nothing is compiled while it installs.
export DS_BUILD_OPS = 0
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: quickstart test test-slow lint install clean

quickstart: $(VENV)/.installed
	$(BIN)/dnsp train configs/quickstart.yaml --ranks 2

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist worksteal $(PYTEST_ARGS)

# What keeps no deadline goes two at a time; the others start ranks, whose times are looked at.
TWO_AT_ONCE = tests/kernels tests/parallel/test_mail.py
MAY_BE_NONE = $(if $(PYTEST_ARGS), || [ $$? -eq 5 ])  # pytest's status where arguments select no test

test-slow: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m slow -n 2 --dist worksteal $(TWO_AT_ONCE) $(PYTEST_ARGS)$(MAY_BE_NONE)
	$(BIN)/python -m pytest -m slow $(TWO_AT_ONCE:%=--ignore=%) $(PYTEST_ARGS)$(MAY_BE_NONE)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

install: $(VENV)/.installed

clean:
	rm -rf $(VENV)

$(VENV)/.made:
	@command -v "$(PYTHON)" >/dev/null || { echo "dnsp: there is no '$(PYTHON)' here; install Python 3.11 or later, or name one: make PYTHON=/path/to/python" >&2; exit 2; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "dnsp: $(PYTHON) is $$("$(PYTHON)" --version 2>&1); dnsp needs Python 3.11 or later: make PYTHON=python3.11" >&2; exit 2; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { echo "dnsp: $(PYTHON) cannot make virtual environments; on Debian: apt install python3-venv" >&2; exit 2; }
	"$(PYTHON)" -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools wheel
	@touch $@

$(VENV)/.installed: $(VENV)/.made pyproject.toml
	$(BIN)/python -m pip install --editable .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python -m pip install -qq --editable ".[test]"
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed-test
	$(BIN)/python -m pip install -qq --editable ".[dev]"
	@touch $@

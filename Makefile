# `make demo` and `make test` do all the set-up themselves; they need Python 3.10 or newer with pip, nothing else.

PYTHON ?= python3
NEWEST := .venv
OLDEST := .venv-oldest
# As many processes as cores; the tests of one file stay together, as they share what they convert and train.
PYTEST := -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile

.PHONY: demo test test-all lint format modeling bench table1 clean

demo: $(NEWEST)/.runtime
	$(NEWEST)/bin/python examples/tiny_polyglot/demo.py

# The whole suite on the newest versions, then what touches transformers on the oldest supported ones. Each side also
# loads what the other one saved.
test: $(NEWEST)/.dev $(OLDEST)/.dev
	SVDCONVERT_OTHER_PYTHON=$(abspath $(OLDEST)/bin/python) $(NEWEST)/bin/python $(PYTEST) -m "not slow"
	SVDCONVERT_OTHER_PYTHON=$(abspath $(NEWEST)/bin/python) $(OLDEST)/bin/python $(PYTEST) -m "not slow" \
		tests/modeling tests/families/test_families.py tests/commands/test_conversion.py tests/commands/test_densify_fold.py tests/commands/test_verify_evaluate.py

test-all: $(NEWEST)/.dev $(OLDEST)/.dev
	SVDCONVERT_OTHER_PYTHON=$(abspath $(OLDEST)/bin/python) $(NEWEST)/bin/python $(PYTEST)
	SVDCONVERT_OTHER_PYTHON=$(abspath $(NEWEST)/bin/python) $(OLDEST)/bin/python $(PYTEST)

lint: $(NEWEST)/.dev
	$(NEWEST)/bin/ruff check .
	$(NEWEST)/bin/ruff format --check .
	$(NEWEST)/bin/mypy

format: $(NEWEST)/.dev
	$(NEWEST)/bin/ruff check --fix .
	$(NEWEST)/bin/ruff format .

# The modeling files of all families, from their templates, and the table of families in docs/families.md.
modeling: $(NEWEST)/.dev
	$(NEWEST)/bin/python modeling/templates/render.py

bench: $(NEWEST)/.dev
	$(NEWEST)/bin/python -m tests.benchmarks

# The dialogue example's Table 1 on the bundled model; rows that are done stay done.
table1: $(NEWEST)/.dev
	$(NEWEST)/bin/python -m examples.dialogue.table1 --config examples/dialogue/settings/table1-tiny.toml

clean:
	rm -rf $(NEWEST) $(OLDEST) build *.egg-info out

$(NEWEST)/bin/python $(OLDEST)/bin/python:
	$(PYTHON) -m venv $(dir $(@D))

$(NEWEST)/.runtime: $(NEWEST)/bin/python pyproject.toml constraints.txt
	$(NEWEST)/bin/pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(NEWEST)/.dev: $(NEWEST)/bin/python pyproject.toml constraints.txt
	$(NEWEST)/bin/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@ $(NEWEST)/.runtime

$(OLDEST)/.dev: $(OLDEST)/bin/python pyproject.toml constraints-oldest.txt
	$(OLDEST)/bin/pip install --quiet --constraint constraints-oldest.txt --editable '.[adapters,test]'
	touch $@

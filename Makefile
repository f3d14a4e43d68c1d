# make ready        sets up .venv and checks in less than a minute whether this machine can run the course
# make run          sets up .venv and fine-tunes the embedded model, then compares its answer with the base model's
# make test         sets up .venv and runs every test, the notebooks included
# make check        lint, types, and the tests that start no processes: about a minute
# make campaign     long searches for faults; writes notebooks/results/campaign.json and faults.json
# make benchmark    measures the fine-tune of the 6B model on this machine's GPUs; CHECKPOINT=folder for real weights
# make practice     writes notebooks/practice: every chapter with its core functions for you to write
# make slides       writes output/slides: every chapter as slides, in HTML files that need no network
# make site         writes output/site: all chapters as a website with search
# make notebooks    executes every notebook in place, outputs as they are committed
# make lab          opens the course in JupyterLab
VENV ?= .venv
RUN := $(VENV)/bin/python
# A name on the PATH proves nothing (version managers leave stubs there): the first Python that runs and fits is taken.
FITS := import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 14))
PYTHON ?= $(shell for name in python3.12 python3.13 python3.11 python3; do \
    "$$name" -c '$(FITS)' >/dev/null 2>&1 && { command -v "$$name"; break; }; done)

# Two test files at a time, each with one thread. On a GPU one at a time: side by side they would count each other's memory.
JOBS ?= $(if $(shell nvidia-smi -L 2>/dev/null),0,2)
# Bytecode is kept, whatever the shell says: without it each of thousands of ranks would compile our modules.
PYTEST = PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

.PHONY: ready run test check lint campaign benchmark practice slides site notebooks lab clean

ready: $(VENV)/installed
	$(RUN) -m helpers.ready

run: $(VENV)/installed
	$(RUN) -m helpers.finetune.demo

test: $(VENV)/installed lint
	$(PYTEST) --nbval-lax --nbval-cell-timeout=900 tests notebooks

# Daily work: what needs no second process.
check: $(VENV)/installed lint
	$(PYTEST) -m "not slow and not campaign" tests

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

campaign: $(VENV)/installed
	$(RUN) tests/benchmarks/campaign.py
	OMP_NUM_THREADS=1 $(RUN) tests/benchmarks/faults.py

benchmark: $(VENV)/installed
	$(RUN) tests/benchmarks/finetune_6b.py $(or $(CHECKPOINT),output/chatglm3-6b-random)
	$(RUN) tests/benchmarks/speed_6b.py $(or $(CHECKPOINT),output/chatglm3-6b-random) --profile
	$(RUN) tests/benchmarks/full_6b.py $(or $(CHECKPOINT),output/chatglm3-6b-random)

practice: $(VENV)/installed
	$(RUN) -m helpers.exercises.practice notebooks/practice

slides: $(VENV)/installed
	$(RUN) -m helpers.slides output/slides

# Any warning, such as a link that leads nowhere, is an error.
site: $(VENV)/installed
	$(RUN) -m sphinx -q -W --keep-going -c docs -d output/site_cache . output/site

notebooks: $(VENV)/installed
	$(VENV)/bin/jupyter nbconvert --to notebook --inplace --execute --coalesce-streams \
	  --ExecutePreprocessor.record_timing=False notebooks/*.ipynb

lab: $(VENV)/installed
	$(VENV)/bin/jupyter lab --notebook-dir=notebooks $(LAB_OPTIONS)

$(VENV)/installed: pyproject.toml
	@$(or $(PYTHON),false) -c '$(FITS)' >/dev/null 2>&1 || \
	  { echo "error: $(or $(PYTHON),no python3 on the PATH) is not Python 3.11, 3.12 or 3.13; name one: make PYTHON=/path/to/python3.12" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --editable '.[test,site]'
	@touch $@

clean:
	rm -rf $(VENV) output *.egg-info

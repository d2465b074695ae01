# `make demo` and `make test` need Python >= 3.10 (with its headers), g++, make and git; uv fetches the rest.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.NOTPARALLEL:  # two syncs at once would fight over one .venv

PYTEST_ARGS ?=
# One process a core, neighbouring tests in the same one, so that their models are made once.
PARALLEL = -n $(MAX_JOBS) --dist worksteal
# A version or a path; uv looks for it and fetches one if there is none. The range is that of `environments` in
# pyproject.toml.
PYTHON ?= >=3.10,<3.14
DEMO_OUT ?= runs/demo

# mmcv's build would start at least four compilers whatever the machine: stay at the core count.
MAX_JOBS ?= $(shell nproc 2>/dev/null || sysctl -n hw.ncpu 2>/dev/null || echo 2)
export MAX_JOBS
# Many tests start a Python, which without bytecode takes 20 s to import torch and timm, and 7 s with it.
export UV_COMPILE_BYTECODE := 1
# Another active environment must not receive our packages.
export UV_PROJECT_ENVIRONMENT := .venv
unexport VIRTUAL_ENV

UV := $(shell command -v uv 2>/dev/null || echo .uv-bootstrap/bin/uv)
VENV := .venv/bin
# A ready-built mmcv (compiling takes four minutes on two cores) is used if this folder has one for our Python;
# all works without. uv would prefer the folder even where nothing in it fits, hence the test of the file name. A
# UV_FIND_LINKS of the caller goes first, and `make test WHEELS=` compiles.
WHEELS ?= ../shared/wheels
PY_TAG = $(shell "$$($(UV) python find '$(PYTHON)' 2>/dev/null)" -c \
  'import sys, platform; print("cp%d%d-*" % sys.version_info[:2] + platform.machine())' 2>/dev/null)
READY = $(wildcard $(WHEELS)/onedl_mmcv-*-$(PY_TAG).whl)
FIND_LINKS = $(if $(UV_FIND_LINKS),,$(if $(READY),UV_FIND_LINKS='$(abspath $(WHEELS))'))

# Inexact, so that a smaller set never removes what a larger one has put in. A lock remembers the wheel folder it was
# made with and is found up to date with another or none, so it is made anew (8 s).
define sync
rm -f uv.lock
$(FIND_LINKS) $(UV) sync --inexact --python '$(PYTHON)'
endef

# The oldest and the newest versions that pyproject.toml allows, each in an environment of its own beside .venv: without
# the constraints of `make test`. A wheel is built and installed, its commands run away from the checkout, then the tests
# that meet timm, torch, numpy and the plotting packages most, on the checkout. uv does not look into pyenv's folders, so
# a Python of the wanted version there is named by its path.
OLDEST_PYTHON ?= $(firstword $(wildcard $(HOME)/.pyenv/versions/3.10.*/bin/python) 3.10)
NEWEST_PYTHON ?= $(firstword $(wildcard $(HOME)/.pyenv/versions/3.13.*/bin/python) 3.13)
VERSION_TESTS ?= $(addprefix tests/test_,timm_contract.py tokens.py recording.py visualize.py plots.py)
define test_versions
$(UV) venv --quiet --clear --python '$(2)' .venv-$(1)
$(UV) pip install --quiet --no-config --python .venv-$(1)/bin/python $(3) .
$(UV) pip install --quiet --no-config --python .venv-$(1)/bin/python 'pytest>=8.4' pytest-xdist 'hypothesis>=6.130' onnxruntime
cd .venv-$(1) && bin/effvit doctor && bin/effvit visualize fashion_mnist:bag-1 --model vit_nano_patch4_28 --pretrained --method evit --out figures
$(UV) pip list --quiet --python .venv-$(1)/bin/python | grep -E '^(torch|timm|numpy|pillow|matplotlib) '
.venv-$(1)/bin/python -m pytest $(PARALLEL) $(VERSION_TESTS) $(PYTEST_ARGS)
endef

define where_installed
@if $(UV) python find --no-python-downloads '$(1)' > /dev/null; then $(MAKE) --no-print-directory $(2); \
else echo '$(2) is left out: no Python $(1) is installed'; fi
endef

.PHONY: help demo check docs test test-transformers test-ray test-oldest test-newest test-versions mutate mutate-sample lint format clean

help: ## show this list
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 28

demo: .venv/.synced-demo ## install without OpenMMLab and run the demo into runs/demo
	$(VENV)/effvit demo --out $(DEMO_OUT)

check: .venv/.synced-dev ## run the fast tests, three minutes on two cores, without OpenMMLab
	$(VENV)/python -m pytest -m fast $(PARALLEL) $(PYTEST_ARGS)

test: .venv/.synced-test ## install everything and run the tests; PYTEST_ARGS="-k name -x" is handed on
	$(VENV)/python -m pytest $(PARALLEL) $(PYTEST_ARGS)

docs: .venv/.synced-docs ## build the documentation site into site/; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(VENV)/mkdocs build --strict

SEED ?= 0
mutate: .venv/.synced-test ## put each fault of tools/mutations.yml into the code: some test must notice it
	$(VENV)/python tools/mutate.py --all --jobs $(MAX_JOBS)

mutate-sample: .venv/.synced-test ## the same with ten of them, drawn by SEED
	$(VENV)/python tools/mutate.py --sample 10 --seed $(SEED) --jobs $(MAX_JOBS)

test-transformers: | $(UV) ## run the tests with transformers and peft, in an environment without OpenMMLab
	$(UV) venv --quiet --allow-existing --python '$(PYTHON)' .venv-transformers
	$(UV) pip install --quiet --python .venv-transformers/bin/python '.[transformers]' 'peft>=0.21' 'pytest>=8.4' 'hypothesis>=6.130'
	.venv-transformers/bin/python -m pytest tests/test_transformers*.py tests/test_imports.py -k transformers $(PYTEST_ARGS)

test-ray: | $(UV) ## run the tutorial on features in shards with two local workers of Ray, in an environment of its own
	$(UV) venv --quiet --allow-existing --python '$(PYTHON)' .venv-ray
	$(UV) pip install --quiet --python .venv-ray/bin/python . 'ray[data]>=2.60,<3' 'pytest>=8.4' 'hypothesis>=6.130'
	.venv-ray/bin/python -m pytest tests/test_tutorials.py -k features_in_shards $(PYTEST_ARGS)

test-oldest: | $(UV) ## run a part of the tests with the oldest versions allowed
	$(call test_versions,oldest,$(OLDEST_PYTHON),--resolution lowest-direct)

test-newest: | $(UV) ## run a part of the tests with the newest versions allowed
	$(call test_versions,newest,$(NEWEST_PYTHON),)

test-versions: | $(UV) ## both of these, each where its Python is installed
	$(call where_installed,$(OLDEST_PYTHON),test-oldest)
	$(call where_installed,$(NEWEST_PYTHON),test-newest)

lint: .venv/.synced-dev ## ruff check, ruff format --check, mypy
	$(VENV)/ruff check .
	$(VENV)/ruff format --check .
	$(VENV)/mypy

format: .venv/.synced-dev ## let ruff fix and format the code
	$(VENV)/ruff check --fix .
	$(VENV)/ruff format .

clean: ## remove the environment, the lock and every cache
	rm -rf .venv .venv-transformers .venv-ray .venv-oldest .venv-newest .uv-bootstrap uv.lock build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps lie inside .venv, so they go with it; each is renewed when pyproject.toml is newer.
.venv/.synced-demo: pyproject.toml | $(UV)
	$(sync) --extra demo
	touch $@

.venv/.synced-dev: pyproject.toml | $(UV)
	$(sync) --extra dev
	touch $@

.venv/.synced-docs: pyproject.toml | $(UV)
	$(sync) --extra docs
	@$(VENV)/python -c 'import mkdocs' || { \
	  echo 'The packages of the site need Python 3.11 or later: "make clean", then "make docs PYTHON=3.11".'; exit 1; }
	touch $@

.venv/.synced-test: pyproject.toml | $(UV)
	$(sync) --extra dev --extra mm
	@$(VENV)/python -c 'import torch, mmcv._ext' || { \
	  echo 'mmcv is installed without its compiled operators (mmcv._ext): look for a compiler error above,'; \
	  echo 'then "$(UV) cache clean onedl-mmcv", "make clean" and again "make test".'; exit 1; }
	touch $@

.uv-bootstrap/bin/uv:
	python3 -m venv .uv-bootstrap
	.uv-bootstrap/bin/python -m pip install --quiet 'uv>=0.9'

# Everything a new machine needs is python3 (3.11 or newer, with venv) and make.
#   make demo    convert the small teacher in the repository, from start to end
#   make test    the default test suite
#   make smoke   a few of its tests, in an environment of their own: for another Python (make smoke PYTHON=python3.13)
#   make lint    ruff and mypy
#   make hashes  the hashes of the pinned versions' files, after a pin has moved
#   make audit   the pinned packages' licences, and known advisories where an index tells them
# PYTHON=/path/to/python3.12 picks another interpreter; .venv is then made again for it.
# REQUIRE_HASHES=no takes packages from an index that builds its own.
# ADVISORIES=DIR takes advisories from a clone of https://github.com/pypa/advisory-database, for `make audit`.

PYTHON ?= python3
PYTEST_ARGS ?= -n logical --dist loadfile --max-worker-restart 0 $(STUCK)
# A test that stands still for five minutes, where none takes two, prints where it stands and ends them all.
STUCK := -o faulthandler_timeout=300 -o faulthandler_exit_on_timeout=true
DEMO_WORKDIR ?= runs/demo
# Huge pages for the tests; a run asks for them by itself (radlads_jax/system/huge_pages.py).
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

# What `make smoke` runs, and that every call of the package's functions is held against their annotations.
SMOKE := $(addprefix tests/,test_imports.py kernels/test_linear_loss.py test_earlier_version.py distill/test_stages.py)
SHAPES := --jaxtyping-packages=radlads_jax,pallas_kernels,beartype.beartype

# Where the environment is made.
VENV ?= .venv

VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
PINS := constraints/$(if $(filter 3.11,$(VERSION)),py311,py312).txt
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
REQUIRE_HASHES ?= yes
STAMP := $(VENV)/.made-for-python-$(VERSION)
# With what the tests need besides: torch above all, which an index may serve with gigabytes of CUDA.
TESTS := $(VENV)/.tests-for-python-$(VERSION)

.DEFAULT_GOAL := help
.PHONY: help demo test smoke lint venv hashes audit clean

help:
	@sed -n 's/^#   //p' Makefile

demo: $(STAMP)
	$(BIN)/python -m radlads_jax.launch --config configs/demo.py --workdir $(DEMO_WORKDIR)

test: $(TESTS)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

# Imports, a kernel against its definition, a conversion from an earlier version's checkpoint to its export, and what
# they call: models and stages. All with every argument's type and every array's shape held against its annotation: a
# fifth of the time (tests/models/test_decoder.py: 106 CPU s, 82 without), more than the whole suite can spare.
smoke:
	$(MAKE) venv VENV=.venv-smoke-$(VERSION)
	.venv-smoke-$(VERSION)/bin/python -m pytest -q -p no:cacheprovider $(STUCK) $(SHAPES) $(SMOKE)

lint: $(TESTS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

venv: $(TESTS)

# Without torch: its wheels differ from index to index, and on Linux bring CUDA or not.
hashes: hashes-3.11 hashes-3.12

.cache/uv .cache/pip-audit:
	$(PYTHON) -m venv $@
	$@/bin/python -m pip install --quiet --disable-pip-version-check $(notdir $@)

hashes-%: .cache/uv
	grep -v '^torch==' constraints/py$(subst .,,$*).txt | UV_CUSTOM_COMPILE_COMMAND='make hashes' $</bin/uv pip compile - \
	    --quiet --no-deps --universal --generate-hashes --python-version $* --output-file constraints/py$(subst .,,$*).hashed.txt

# Strict: a package that the index knows no advisories of, for it has no such service, is an error and no pass.
audit: $(TESTS) $(if $(ADVISORIES),,.cache/pip-audit)
	$(BIN)/python tests/measure/audit.py $(if $(ADVISORIES),--advisories '$(ADVISORIES)')
	$(if $(ADVISORIES),,.cache/pip-audit/bin/pip-audit --strict --disable-pip --no-deps --progress-spinner off \
	    --requirement $(PINS) || { echo "That is an advisory, or an index that serves none: then give a clone, ADVISORIES=DIR."; exit 1; })

clean:
	rm -rf .venv .venv-smoke-*

# The stamp goes first: an installation that was interrupted leaves none, and the next run starts over.
$(STAMP): pyproject.toml $(PINS)
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("radlads_jax needs Python 3.11 or newer, but $(PYTHON) is %d.%d. Say which to use: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)" % sys.version_info[:2])'
	@test ! -e $(VENV)/.made-by-setup-env || { echo "$(VENV) was made by launch/setup_env.sh, for an accelerator, and is not replaced. Give another place: make VENV=.venv-cpu $(MAKECMDGOALS), or remove it." >&2; exit 1; }
	rm -f $(VENV)/.made-for-python-*
	$(PYTHON) -m venv --clear $(VENV)
	$(if $(filter yes,$(REQUIRE_HASHES)),$(PIP) --no-deps --require-hashes --requirement $(PINS:.txt=.hashed.txt))
	$(PIP) --constraint $(PINS) setuptools
	$(PIP) --constraint $(PINS) --no-build-isolation --editable .
	touch $@

$(TESTS): $(STAMP)
	$(PIP) --constraint $(PINS) --no-build-isolation --editable '.[test]'
	touch $@

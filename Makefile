# Every target is self-sufficient: it makes .venv, installs and builds what it needs.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --quiet --disable-pip-version-check install -c constraints.txt
INPUTS := pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/*)

.PHONY: demo test bench docs lint format clean

demo: $(VENV)/.demo
	$(BIN)/python -m normwise demo

# A process a core, each of one thread: the tests that are about threads set their own number.
test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

bench: $(VENV)/.dev
	$(BIN)/python -m benchmarks

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet
	@echo build/site/index.html

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# The kernels, editable: Python edits are live, an edit under csrc/ rebuilds. They compile while
# torch, which they do not need, is unpacked: a minute less on two cores.
$(VENV)/.built: $(BIN)/python $(INPUTS)
	@echo "building the kernels and installing torch (about two minutes the first time)"
	@$(PIP) --no-deps -e . & build=$$!; $(PIP) torch numpy; got=$$?; wait $$build && test $$got -eq 0
	@touch $@

# The browser in which the report's pages are tested. Where it cannot be had, those tests are skipped.
$(VENV)/.browser: $(BIN)/python
	@for name in chromium chromium-browser google-chrome; do \
	  command -v $$name >/dev/null && exit 0; done; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium \
	    >/dev/null || echo "no chromium: the tests of the report in a browser will be skipped"; fi
	@touch $@

$(VENV)/.dev: $(VENV)/.browser

# The extras of the package that stands there already.
$(VENV)/.demo $(VENV)/.dev $(VENV)/.docs: $(VENV)/.%: $(VENV)/.built
	@$(PIP) "normwise[$*]"
	@$(BIN)/python -c "import normwise; print(normwise.backends())"
	@touch $@

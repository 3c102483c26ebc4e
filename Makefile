# Everything the template needs: pip and venv alone suffice. Another interpreter:
#   PYTHON=python3.12 make test
PYTHON ?= $(shell for python in python3.11 python3; do \
	$$python -c "" 2>/dev/null && echo $$python && break; done)
BIN := .venv/bin
TEMPLATE := {{cookiecutter.project_slug}}
# Bakes the default project into the folder $(1), without the person's cookiecutter settings.
bake = HOME="$(1)" $(BIN)/cookiecutter --no-input --default-config --output-dir "$(1)" .
# Every optional part of it.
PARTS := slurm=yes fabric=yes docker=yes
# mypy as strict for all of a project as its pyproject.toml is for the engine.
STRICT := --strict --allow-untyped-defs --allow-incomplete-defs --allow-any-generics --allow-subclassing-any --allow-untyped-calls --implicit-reexport --no-warn-return-any --enable-error-code attr-defined --enable-error-code override --enable-error-code union-attr --enable-error-code var-annotated
# Makes a folder $$bakery that is deleted when the recipe ends.
bakery = set -e; bakery=$$(mktemp -d); trap 'rm -rf "$$bakery"' EXIT

# Bakes the default project into .demo/ and trains it there; nothing leaves this machine.
demo: .venv/ready
	rm -rf .demo && mkdir .demo
	$(call bake,.demo)
	cd .demo/my-project && \
	  WANDB_MODE=offline ../../$(BIN)/python main.py fit --config configs/digits.yaml
	@echo "What came out, in .demo/my-project:"
	@cd .demo/my-project && find runs -type f \( -not -path "*/wandb/*" -o -name "*.wandb" \) | sort

# What one wants while typing: layout, baked files, traps of ranks, a team's command line.
QUICK := $(addprefix tests/test_,layout.py generation.py ranks.py extension.py internals.py)

quick: .venv/ready  # in a minute
	$(BIN)/python -m pytest -n auto -m "not slow" $(QUICK)

test: .venv/ready  # all tests that are not slow, in minutes
	$(BIN)/python -m pytest -n auto -m "not slow"

test-all: test  # and the slow ones: fresh environments, `make demo`
	$(BIN)/python -m pytest -n auto -m slow

ROUNDS ?= 100
# Kills and resumes this number of runs at random moments, and compares them with undisturbed ones.
chaos: .venv/ready
	$(BIN)/python tests/chaos.py --rounds $(ROUNDS)

# What a step, a longer run, several ranks and the start cost, beside others: benchmarks/results/.
# For half an hour on a quiet machine. With a GPU there is benchmarks/gpu.py, for five minutes.
bench: .venv/ready
	$(BIN)/python benchmarks/bench.py
	$(BIN)/python benchmarks/growth.py
	$(BIN)/python benchmarks/ranks.py
	$(BIN)/python benchmarks/start.py

picture: .venv/ready  # docs/terminal.svg: a terminal in which the example was just trained
	$(BIN)/python docs/picture.py

check: .venv/ready  # Python and workflows, the template's own and a baked project's; never writes
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/zizmor --offline --strict-collection --persona pedantic .github
	$(BIN)/actionlint .github/workflows/*.yml
	@$(bakery); $(call bake,$$bakery) $(PARTS); PATH="$(CURDIR)/$(BIN):$$PATH"; \
	cd "$$bakery/my-project"; set -x; \
	ruff check .; ruff format --check .; mypy $(STRICT) --python-executable "$(CURDIR)/$(BIN)/python"; \
	zizmor --offline --strict-collection --persona pedantic .; actionlint .github/workflows/*.yml

# The only Jinja in Python files is the package's name: what ruff repairs in a bake is copied back.
fix: .venv/ready  # what ruff can repair by itself
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	@$(bakery); $(call bake,$$bakery) $(PARTS) package_name=package_of_the_template; \
	cd "$$bakery/my-project"; \
	"$(CURDIR)/$(BIN)/ruff" check --fix . || true; "$(CURDIR)/$(BIN)/ruff" format .; \
	find . -name "*.py" | while read -r file; do \
	  origin=$$(echo "$$file" | sed "s/package_of_the_template/{{cookiecutter.package_name}}/"); \
	  sed "s/package_of_the_template/{{ cookiecutter.package_name }}/g" "$$file" \
	    > "$(CURDIR)/$(TEMPLATE)/$$origin"; \
	done

.venv/ready: requirements.txt
	@echo "Making .venv with $(PYTHON): downloads PyTorch and its companions once, in some minutes."
	$(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --disable-pip-version-check --requirement requirements.txt
	@touch $@

.PHONY: demo quick test test-all chaos bench picture check fix

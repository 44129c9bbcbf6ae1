# Everything here sets itself up: only Python 3.11 or newer and make are needed.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PORT ?= 5000
SCHEDULES ?= 100000

# Arguments of pytest. Each worker starts servers of its own, and waits for them half of its time:
# four keep two cores busy.
TEST_ARGS ?= -n 4 --dist worksteal

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo billing edge test oldest contract soak lint protocol bench million faults rules dashboard docs dist servers chromium prometheus neighbours clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' Makefile

# The environment -----------------------------------------------------------------------------
#
# A stamp stands for one set of extras: `.venv/with-shop` for `pip install -e .[typed]`. It is
# renewed when setup.cfg changes. Sets add up in the one environment.

EXTRAS_shop := [typed]
EXTRAS_shop-redis := [typed,redis]
EXTRAS_shop-mongodb := [typed,mongodb]
# In front of the environment's own packages: its tools need newer ones than some of these.
OLDEST := $(VENV)/oldest
# The same for an old Flask-Session, whose sessions are taken over.
FLASK_SESSION := $(VENV)/flask-session-0.5

EXTRAS_billing := [grpc]
EXTRAS_edge := [grpc]
EXTRAS_test := [test,bench]
EXTRAS_docs := [docs]
EXTRAS_dist := [dist]

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Flask-GSession needs Python 3.11 or newer, and '$(PYTHON)' is not that."; \
	  echo "Name another one: make PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "'$(PYTHON)' cannot make virtual environments: its venv or ensurepip is missing."; \
	  echo "On Debian and Ubuntu: apt-get install python3-venv"; exit 1; }
	@$(PYTHON) -m venv --clear $(VENV)

$(VENV)/with-%: setup.cfg | $(PY)
	@echo "Installing flask-gsession$(EXTRAS_$*) in $(VENV)"
	@$(PY) -m pip install --quiet --disable-pip-version-check --editable '.$(EXTRAS_$*)'
	@touch $@

# What one does with it -----------------------------------------------------------------------

# STORE is handed over by environment and unexpanded, because it may hold a password.
DEMO_EXTRAS := $(if $(filter redis% unix%,$(STORE)),shop-redis,$(if $(filter mongodb%,$(STORE)),shop-mongodb,shop))
ifdef STORE
demo: export SHOP_STORE = $(value STORE)
endif
demo: $(VENV)/with-$(DEMO_EXTRAS) ## Run the demo shop; STORE=redis://localhost:6379, PORT=5055
	@$(PY) -m examples.shop --port $(PORT)

billing: $(VENV)/with-billing ## Run a shop and its billing, which share sessions by gRPC; PORT=5055
	@$(PY) -m examples.billing --port $(PORT)

edge: $(VENV)/with-edge ## Run a shop with a branch that keeps selling while it is cut off; PORT=5055
	@$(PY) -m examples.edge --port $(PORT)

test: $(VENV)/with-test $(OLDEST)/ready $(FLASK_SESSION)/ready servers chromium prometheus neighbours ## Run the tests; TEST_ARGS="-k redis -x" for some of them
	$(PY) -m pytest $(TEST_ARGS)
	PYTHONPATH=$(OLDEST) $(PY) -m pytest $(TEST_ARGS) $(OLDEST_SMOKE)

OLDEST_SMOKE := tests/stores/test_redis_pool.py tests/stores/test_store_contract.py \
  -k "TestStores or redis_pool"
OLDEST_TESTS := $(addprefix tests/,test_as_flask_does.py test_authentication.py \
  cli/test_command.py contrib/test_metrics.py contrib/test_ratelimit.py \
  guarantees/test_g01_no_cost_unused.py request/test_locks.py request/test_session_object.py request/test_streaming.py \
  stores/test_redis_answers.py stores/test_redis_pool.py stores/test_redis_servers.py \
  stores/test_redis_versions.py stores/test_store_contract.py stores/test_topologies.py \
  sharing/test_passport.py sharing/test_remote_store.py stores/test_remote_contract.py \
  typed/test_typed.py typed/test_typed_round_trip.py values/test_codec.py \
  values/test_large_values.py values/test_payload.py watching/test_debug.py)

$(OLDEST)/ready: tests/oldest.txt setup.cfg | $(VENV)/with-test
	@rm -rf $(OLDEST)
	@$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --target $(OLDEST) \
	  --requirement tests/oldest.txt
	@touch $@

$(FLASK_SESSION)/ready: tests/moving/flask_session_0.5.txt | $(VENV)/with-test
	@rm -rf $(FLASK_SESSION)
	@$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --target $(FLASK_SESSION) \
	  --requirement tests/moving/flask_session_0.5.txt
	@touch $@

oldest: $(OLDEST)/ready servers ## Run many tests with the oldest supported packages
	@for pin in 'redis<6' 'redis==8.0.1'; do echo "Beside $$pin"; \
	$(PY) -m pip install --quiet --disable-pip-version-check --dry-run --ignore-installed \
	  '.[redis]' "$$pin" || exit 1; done
	PYTHONPATH=$(OLDEST) $(PY) -m pytest $(TEST_ARGS) $(OLDEST_TESTS) \
	  --deselect tests/typed/test_typed.py::test_mypy_infers_the_types

contract: $(VENV)/with-test servers ## Run the store contract on each wrapper around each store
	$(PY) -m pytest -m contract $(TEST_ARGS)

long: $(VENV)/with-test servers ## Run `make contract`, the models whole, and more faults
	$(PY) -m pytest -m "contract or long" $(TEST_ARGS)

soak: $(VENV)/with-test ## Run the simulation and the freshness test for longer; SCHEDULES=500000
	SIM_SCHEDULES=$(SCHEDULES) $(PY) -m pytest $(TEST_ARGS) tests/simulation
	EDGE_CRASHES=2 $(PY) -m pytest $(TEST_ARGS) tests/simulation/test_edge_model.py
	EDGE_STRIDE=1 $(PY) -m pytest $(TEST_ARGS) tests/edge/test_settling.py
	SIM_TAKEOVERS=100000 $(PY) -m pytest $(TEST_ARGS) tests/moving/test_simulated_takeovers.py
	FRESHNESS_WRITES=100000 FRESHNESS_WORKERS=8 $(PY) -m pytest $(TEST_ARGS) \
	  tests/guarantees/test_g12_bound.py -k writes_and_revocations

lint: $(VENV)/with-test ## Check style and types
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy --strict flask_gsession examples

# grpcio-tools 1.76 makes code that protobuf 6.31 and newer can read, the next major too.
protocol: | $(PY) ## Generate the messages of flask_gsession/protocol/gsession.proto
	@$(PYTHON) -m venv --clear $(VENV)/protoc
	@$(VENV)/protoc/bin/python -m pip install --quiet grpcio-tools==1.76.0
	$(VENV)/protoc/bin/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. \
	  flask_gsession/protocol/gsession.proto

bench: $(VENV)/with-test servers ## Measure side by side with Flask-Session
	$(PY) -m benchmarks
	$(PY) -m benchmarks.edge
	$(PY) -m benchmarks.live
	$(PY) -m benchmarks.requests_per_second

million: $(VENV)/with-test servers ## Let a million sessions expire, and measure how long other clients wait
	$(PY) -m benchmarks.expiring

faults: $(VENV)/with-test servers ## Strike real servers under load; FAULTS_ARGS="--only redis kill"
	$(PY) -m tests.faults $(FAULTS_ARGS)
	$(if $(FAULTS_ARGS),,$(PY) -m tests.faults.cleaning)

dashboard: $(VENV)/with-test servers prometheus ## Draw the dashboard's queries from a real Prometheus
	$(PY) -m benchmarks.dashboard

rules: prometheus ## Check the alert rules, with Prometheus' own promtool
	@PATH=$$PATH:$(VENV)/prometheus; set -x; \
	promtool check rules flask_gsession/contrib/prometheus-rules.yml && \
	promtool test rules tests/harness/prometheus_rules_test.yml

docs: $(VENV)/with-docs ## Build the documentation in docs/_build
	$(PY) -m sphinx -W --keep-going -b html docs docs/_build

dist: $(VENV)/with-dist ## Build the wheel and the source distribution in dist/
	@rm -rf dist
	$(PY) -m build --outdir dist
	$(PY) -m twine check --strict dist/*

servers: | $(VENV)/with-test
	@sh tests/harness/setup_redis.sh $(PY)
	@sh tests/harness/setup_mongodb.sh $(PY)

chromium:
	@sh tests/harness/setup_chromium.sh

prometheus: | $(PY)
	@sh tests/harness/setup_prometheus.sh $(abspath $(VENV))/prometheus

neighbours: | $(PY)
	@sh tests/harness/setup_proxies.sh $(abspath $(VENV))/proxies
	@sh tests/harness/setup_node.sh $(abspath $(VENV))/node

clean: ## Remove everything that make created, and the orders of the demo shop
	rm -rf $(VENV) build dist *.egg-info docs/_build
	rm -rf .hypothesis .mypy_cache .pytest_cache .ruff_cache examples/shop/instance
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# `make help` lists what there is.

PYTHON ?= python3
BIN := .venv/bin
ROOT_PACKAGES := mariadb-server mariadb-client postfix postfix-mysql postfix-lmdb dovecot-core dovecot-imapd dovecot-pop3d \
	dovecot-lmtpd dovecot-mysql rspamd postsrsd knot
TEST_PACKAGES := $(ROOT_PACKAGES) chromium nginx-light php-cli php-curl curl libcap2-bin e2fsprogs mount systemd fail2ban \
	pdns-server pdns-backend-sqlite3
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help run demo test check format bench openapi lock packages-demo packages-test

help: ## list these commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1|\2/' | column -t -s '|'

run: .venv/run ## try it out here, without root: API, worker and service on SQLite (PORT=8825, DATABASE_URL=…)
	@exec $(BIN)/cacert-mail run

demo: packages-demo .venv/dev ## the whole story with real Postfix, Dovecot and MariaDB (root; ONCE=1 ends by itself)
	@exec $(BIN)/python -m demo

test: packages-test .venv/dev ## all tests, with the real programs (root)
	$(BIN)/pytest -n $${TEST_PROCESSES:-2} --dist worksteal $(ARGS)

check: .venv/dev ## what needs no root: format, lint, types, import contracts, OpenAPI and migrations drift
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check --quiet .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/cacert-mail openapi | cmp - openapi/openapi.json || { echo "openapi/openapi.json is out of date: make openapi"; exit 1; }
	@rm -rf .venv/drift.db*
	DATABASE_URL=sqlite+aiosqlite:///.venv/drift.db $(BIN)/cacert-mail db upgrade
	DATABASE_URL=sqlite+aiosqlite:///.venv/drift.db $(BIN)/alembic check

format: .venv/dev ## put the code into its one format
	$(BIN)/ruff check --quiet --fix .
	$(BIN)/ruff format --quiet .

openapi: .venv/run ## write openapi/openapi.json anew
	$(BIN)/cacert-mail openapi > openapi/openapi.json

bench: packages-demo .venv/dev ## measure speed, as ratios in one run (root); writes bench/results.json
	@exec $(BIN)/python -m bench $(ARGS)

lock: ## resolve the pinned packages anew (wants uv)
	uv pip compile -q pyproject.toml --group build --generate-hashes --no-header --no-annotate --python-version 3.11 -o requirements.lock
	uv pip compile -q pyproject.toml --group build --group dev --generate-hashes --no-header --no-annotate --python-version 3.11 -c requirements.lock -o requirements-dev.lock

.venv/run: requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --require-hashes -r requirements.lock
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

.venv/dev: requirements-dev.lock .venv/run
	$(BIN)/pip install --quiet --require-hashes -r requirements-dev.lock
	@touch $@

# Debian's programs, installed where that can be done, and named where it cannot. No question is asked on the way, and a
# daemon of the distribution need not run: the tests start their own.
define install
	@missing=$$(for name in $(1); do dpkg-query -W -f '$${db:Status-Status}' $$name 2>/dev/null | grep -qx installed || echo $$name; done); \
	if [ -n "$$missing" ]; then \
		if [ "$$(id -u)" != 0 ]; then echo "Missing Debian packages:" $$missing; echo "Install them, or run this as root."; exit 1; fi; \
		echo "Installing" $$missing; \
		echo "postfix postfix/main_mailer_type select No configuration" | debconf-set-selections; \
		export DEBIAN_FRONTEND=noninteractive; \
		apt-get update -qq && apt-get install -qq -y --no-install-recommends $$missing </dev/null >/dev/null; \
	fi
	@[ "$$(id -u)" = 0 ] || { echo "This wants root: it starts Postfix and Dovecot, and gives mailboxes their own uids."; exit 1; }
endef

packages-demo:
	$(call install,$(ROOT_PACKAGES))

packages-test:
	$(call install,$(TEST_PACKAGES))

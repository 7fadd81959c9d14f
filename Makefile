.PHONY: lock
lock: ## resolve the pinned packages anew
	uv pip compile -q pyproject.toml --group build --generate-hashes --no-header --no-annotate --python-version 3.11 -o requirements.lock
	uv pip compile -q pyproject.toml --group build --group dev --generate-hashes --no-header --no-annotate --python-version 3.11 -c requirements.lock -o requirements-dev.lock

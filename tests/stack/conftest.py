from tests.stack.accounts import account, alias, stack

__all__ = ["account", "alias", "stack"]

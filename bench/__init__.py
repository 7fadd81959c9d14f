"""How fast it is, on the real programs. `make bench`; `__main__.py` says what each figure means."""

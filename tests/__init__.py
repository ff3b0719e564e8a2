"""The test suite. `python -m tests` runs it on every backend; see `__main__.py`."""

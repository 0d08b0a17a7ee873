"""The suites of `python -m scripts.bench`."""

"""The tests against other programs are collected only where those are: PyTorch and
transformers, which the extra peers has."""

import importlib.util


PEERS = ("torch", "transformers")
_HERE = all(importlib.util.find_spec(name) is not None for name in PEERS)
collect_ignore_glob = [] if _HERE else ["test_*.py"]

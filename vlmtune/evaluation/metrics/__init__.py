"""Metrics; `METRICS` in `registry.py` lists them."""

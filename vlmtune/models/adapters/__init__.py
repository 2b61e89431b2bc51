"""Adapter methods; `ADAPTERS` in `registry.py` lists them."""

"""Model families; `FAMILIES` in `registry.py` lists them."""

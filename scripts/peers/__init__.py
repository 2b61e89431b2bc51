"""The parts of scripts/bench_peers.py: a model and data that it makes, one file for each tool, and
what is measured of them."""

"""The parts that `make_tiny_vlm.py` puts together: pictures, wording, architecture, training."""

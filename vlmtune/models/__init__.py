"""The model: families, loading, quantisation, adapters, the forward pass, merging."""

"""The recipe: one YAML file, typed and strict. Imports no torch."""

"""Where in the recipe a key stands that an error is about."""

from __future__ import annotations

import re

from vlmtune.errors import VlmtuneError
from vlmtune.preflight.problems import Problems
from vlmtune.recipe.load import LoadedRecipe
from vlmtune.recipe.yaml12 import parse_yaml

_KEY = re.compile(r"\b[a-z][a-z_]*(?:\.[a-z_]+)*")


class Places:
    """The lines of a recipe's keys. Errors of the model and its modules name the key in their
    first words; others are about `model`."""

    def __init__(self, loaded: LoadedRecipe) -> None:
        self._file = str(loaded.path)
        document, _ = parse_yaml(loaded.text, file=self._file)
        self._lines = {".".join(map(str, path)): line for path, line in document.lines.items()}

    def add_error(self, problems: Problems, error: VlmtuneError) -> None:
        """Note `error`; one that names no file gets the recipe's, and the line of its key."""
        if error.file is None:
            error.file = self._file
            error.line = self._line(str(error))
        problems.add_error(error)

    def _line(self, text: str) -> int | None:
        named = (match.group() for match in _KEY.finditer(text))
        found = (self._lines.get(name) for name in named)
        return next((line for line in found if line is not None), self._lines.get("model"))

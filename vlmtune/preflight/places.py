"""Where in the recipe a key stands that an error is about."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from vlmtune.errors import VlmtuneError
from vlmtune.preflight.problems import Problems, Severity
from vlmtune.recipe.explain import Place
from vlmtune.recipe.load import LoadedRecipe
from vlmtune.recipe.yaml12 import dotted

_QUOTED = re.compile(r"(?<!\w)(['\"]).*?\1(?!\w)")
_WORD = re.compile(r"(?<![\w./\\-])[a-z][a-z_]*(?:\.[a-z_]+)*(?![\w/\\-])")


class Places:
    """Where the keys of a recipe were written: a line of its file, or an override."""

    def __init__(self, loaded: LoadedRecipe) -> None:
        self._model = loaded.recipe.model
        self._places = {dotted(path): place for path, place in loaded.places.items()}

    def add_error(
        self,
        problems: Problems,
        error: VlmtuneError,
        *,
        about: Sequence[str] = ("model",),
        severity: Severity = "error",
    ) -> None:
        """Note `error`; one that names no file gets the place of the key that it names, or else
        of the first of the keys `about` that is written."""
        if error.file is None:
            place = self._place(error, about)
            error.file, error.line = place.file, place.line
        problems.add_error(error, severity=severity)

    def _place(self, error: VlmtuneError, about: Sequence[str]) -> Place:
        named = [key for text in (error.message, error.do or "") for key in self._named(text)]
        written = (key for key in (*named, *about, "model") if key in self._places)
        return self._places[next(written)]

    def _named(self, text: str) -> Iterator[str]:
        """The keys that `text` names. Values are none of them: the model's name or folder, what
        is quoted, paths. A key that is an English word (`model`, `train`) is meant as one only at
        the beginning or before a colon."""
        text = _QUOTED.sub("", text.replace(self._model, ""))
        for found in _WORD.finditer(text):
            key, rest = found.group(), text[found.end() :]
            is_no_english_word = "_" in key or "." in key
            if is_no_english_word or found.start() == 0 or rest.startswith(":"):
                yield key

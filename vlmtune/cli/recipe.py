"""`vlmtune recipe show` and `vlmtune recipe schema`."""

from __future__ import annotations

import sys

from vlmtune.cli.common import (
    DebugOption,
    JsonOption,
    OverridesArgument,
    QuietOption,
    RecipeArgument,
    command,
    print_json,
)
from vlmtune.recipe.load import dump_recipe, load_recipe, recipe_json_schema, resolved_values


@command
def show_command(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Print the resolved recipe: defaults filled in, overrides applied, paths absolute."""
    loaded = load_recipe(recipe, overrides or ())
    if json:
        print_json(resolved_values(loaded.recipe))
    else:
        sys.stdout.write(dump_recipe(loaded.recipe))


@command
def schema_command(
    json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Print the JSON schema of a recipe, for editors."""
    print_json(recipe_json_schema())

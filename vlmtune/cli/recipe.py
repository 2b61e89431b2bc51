"""`vlmtune recipe show` and `vlmtune recipe schema`.

The recipe is imported inside the commands: pydantic's start is half of what `--help` may take.
"""

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


@command
def show_command(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Print the resolved recipe: defaults filled in, overrides applied, paths absolute."""
    from vlmtune.recipe.load import dump_recipe, load_recipe, resolved_values

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
    from vlmtune.recipe.load import recipe_json_schema

    print_json(recipe_json_schema())

"""What the verbs that take a recipe share: their arguments, and the dry run."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rollouts.recipes.schema import Recipe


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """RECIPE, --dry-run, and any recipe key as an override (``args.overrides``)."""
    parser.add_argument("recipe", metavar="RECIPE.yaml", nargs="?", help="the recipe; without one, flags say it all")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved recipe as YAML and stop")
    parser.set_defaults(takes_overrides=True)
    parser.epilog = "Every key of the recipe is a flag too, for example --train.batch_size 16 --model PATH."


def resolve_recipe(kind: str, args: argparse.Namespace) -> Recipe | None:
    """The validated recipe; None after a dry run has printed it.

    Raises:
        UserError: see ``load_recipe``.
    """
    from rollouts.recipes.load import load_recipe, to_yaml

    recipe = load_recipe(kind, args.recipe, args.overrides)
    if args.dry_run:
        print(to_yaml(recipe), end="")
        return None
    return recipe

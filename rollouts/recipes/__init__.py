"""Recipes: what a run is, as YAML checked against a strict schema before anything loads."""

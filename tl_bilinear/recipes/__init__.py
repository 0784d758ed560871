"""Training recipes, each ending in objects that the rest of the package takes."""

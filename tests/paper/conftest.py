"""The images and stories of the recipes' tests."""

from tests.recipes.conftest import idx_folder, story_data, striped, trained

__all__ = ["idx_folder", "story_data", "striped", "trained"]

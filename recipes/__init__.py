"""Recipes: Python functions that return a complete configuration, and the two programs that run them."""

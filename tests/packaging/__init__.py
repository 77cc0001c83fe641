"""The wheel and the sdist: contents, metadata, and whether they work in an empty environment."""

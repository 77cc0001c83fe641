"""The checks of `memkv doctor`, by what they look at."""

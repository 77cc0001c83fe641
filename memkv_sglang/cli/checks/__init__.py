"""The checks of `memkv doctor`."""

"""Apply and revert the patches in `patches/`, which make `memkv` one of SGLang's own backends."""

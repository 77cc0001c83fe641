"""SGLang with `memkv` among its own backends: the series in `patches/`, put in and taken out."""

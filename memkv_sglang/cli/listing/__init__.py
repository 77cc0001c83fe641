"""Which pages a tier holds, for `inspect` and `verify`; nothing is changed by looking."""

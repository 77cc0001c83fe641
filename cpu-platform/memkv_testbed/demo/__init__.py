"""`make demo`: two SGLang servers behind a router share every prefix."""

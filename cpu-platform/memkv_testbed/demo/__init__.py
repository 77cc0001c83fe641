"""`make demo`: SGLang servers behind a router share every prefix."""

"""List the pages of a tier, for `inspect` and `verify`, without changing anything."""

"""The pages of one call, read at once."""

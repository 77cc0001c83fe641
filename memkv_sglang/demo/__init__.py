"""`make demo`: see pages go down both tiers and come back."""

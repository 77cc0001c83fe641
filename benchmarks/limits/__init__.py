"""Programs that measure the upper limits: what the disk and the server can deliver."""

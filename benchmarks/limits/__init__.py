"""Programs that measure what the disk and the server can deliver: the upper limit."""

"""Pages' bytes to and from the disk: many requests in flight, straight from and to buffers."""

"""Disk I/O with many requests in flight, directly from and to the pages' buffers."""

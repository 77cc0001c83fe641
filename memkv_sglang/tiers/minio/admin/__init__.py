"""The control path: bucket, lifecycle rule and policies."""

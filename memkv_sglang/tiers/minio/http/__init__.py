"""HTTP to S3 servers: framing, connections, TLS, deadlines and error texts."""

"""What a user would pick instead: each peer a module, all under one contract."""

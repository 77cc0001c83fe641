"""The alternatives that a user could choose: one module per peer, all with the same contract."""

"""Replay sessions of coding agents on two servers behind SGLang's router."""

"""Stands in for Nova: only what a client needs to raise Nova's exceptions again."""

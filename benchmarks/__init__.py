"""Benchmarks of bnext against what a user would pick instead; not part of the installed package."""

"""Benchmarks of bnext against what a user would pick instead; not part of the installed package."""

import os

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler, or it talks into the tables

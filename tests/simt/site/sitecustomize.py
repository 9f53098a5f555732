"""Every Python process that device.py starts, and each that those start, reads this first."""

from simt.operators import enable

enable()

"""`python -m svdconvert`."""

from svdconvert.program import run

run()

"""What pyproject.toml cannot say to setuptools 65 and to today's alike; all else is there."""

from setuptools import setup

# In pyproject.toml a bare string is an error before setuptools 77, a table one from 2027 on.
setup(license="MIT")

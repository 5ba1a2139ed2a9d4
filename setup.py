"""What pyproject.toml cannot say to setuptools 65 and to today's alike; all else is there."""

from pathlib import Path

from setuptools import Distribution, setup

options = {}
if list(Path(__file__).resolve().parent.glob("csrc/libfusedformer_*.so")):
    # `fusedformer build --into csrc` came before: a wheel with libraries inside, for this
    # platform and any Python.
    try:
        from setuptools.command.bdist_wheel import bdist_wheel
    except ImportError:  # before setuptools 70.1
        from wheel.bdist_wheel import bdist_wheel

    class PlatformWheel(bdist_wheel):
        def get_tag(self):
            return "py3", "none", super().get_tag()[2]

    class PlatformDistribution(Distribution):
        def has_ext_modules(self):
            return True

    options = {"cmdclass": {"bdist_wheel": PlatformWheel}, "distclass": PlatformDistribution}

# In pyproject.toml a bare string is an error before setuptools 77, a table one from 2027 on.
setup(license="MIT", **options)

"""The package's version, without imports, so that setup.cfg can read it."""

__version__ = "0.1.0"

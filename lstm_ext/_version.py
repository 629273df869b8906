"""The version of the package, and nothing else: builds read it without importing."""

__version__ = "0.1.0"

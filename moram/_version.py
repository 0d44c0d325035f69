"""The version of the library, nowhere else: setup.py and `moram --version` read it here."""

__version__ = "0.1.0"

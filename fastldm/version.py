"""The version of fastldm, for packaging and all modules."""

__version__ = "0.1.0"

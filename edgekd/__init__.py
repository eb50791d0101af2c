"""edgekd: from a big teacher network to a small student measured on your own board."""

__version__ = "0.1.0"

"""One NVIDIA GPU: is everything right on it, and how fast is it. See __main__.py."""

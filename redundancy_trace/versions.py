"""Versions of this package and of the libraries that a number may depend on, told without importing them."""

from importlib.metadata import PackageNotFoundError, version

_LIBRARIES = ("redundancy-trace", "torch", "transformers", "tokenizers", "safetensors", "numpy", "polars")


def library_versions() -> dict[str, str]:
    """Name of the distribution to its version, this package first; `unknown` where it is not installed."""
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found

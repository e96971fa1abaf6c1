"""``callable``, of the package ctypes-callable: it asks CPython itself. Elsewhere the builtin serves."""

try:
    from ctypes_callable import callable
except (ImportError, AttributeError):  # not installed, or another interpreter
    from builtins import callable

__all__ = ["callable"]

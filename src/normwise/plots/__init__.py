"""Pictures: one function a file, numbers from the library itself. Needs ``normwise[plots]``."""

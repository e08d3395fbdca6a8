"""Backends: one folder per target, found by entry point."""

if __name__ != "fp4compile.backends":
    raise ImportError("import fp4compile.backends, not the top-level folder: a second copy registers its ops twice")

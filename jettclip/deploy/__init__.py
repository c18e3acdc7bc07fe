"""A trained model in use: `export` writes it, `runtime` runs it, `timing` measures it."""

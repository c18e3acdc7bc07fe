"""A trained model where people use it: `export` writes it, `runtime` runs it without PyTorch, `timing` measures it."""

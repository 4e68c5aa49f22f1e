"""The rows of the JAX adapter that are more than a function's name, by family."""

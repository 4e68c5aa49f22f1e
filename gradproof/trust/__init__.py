"""The proof of the product: planted faults, mutants, soaks, digits. Nothing here is needed to use it."""

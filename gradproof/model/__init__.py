"""The vocabulary under everything: layers, networks, cases, dtypes, and the contract of an adapter."""

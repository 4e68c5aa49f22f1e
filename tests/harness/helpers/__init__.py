"""What several test files need: small networks and cases, stand-in adapters, and what is asked of an examination."""

"""Many networks, many adapters: driven, counted and stopped."""

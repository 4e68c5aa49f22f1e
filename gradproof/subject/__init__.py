"""An adapter under test: how it is found, kept in a process of its own, and watched."""

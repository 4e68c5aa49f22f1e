"""Frameworks behind one interface: one file each, imported when asked for by name."""

"""What people read: the diff of a network, the table of layers, a sweep, progress."""

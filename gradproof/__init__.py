"""gradproof: random networks, one set of numbers, a backward pass written by hand, and yours.

`gradproof.check.check` examines adapters on random networks; `gradproof.adapter.Adapter` is the contract
to implement; `gradproof.reference.LAYERS` is the table of layers. Frameworks are imported when asked for.
"""

from importlib.metadata import version

__version__ = version("gradproof")

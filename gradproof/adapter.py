"""The contract of an adapter, under the name by which adapters that are older than `gradproof.Adapter` import it."""

from gradproof.model.adapter import Adapter, AdapterError, Forward

__all__ = ["Adapter", "AdapterError", "Forward"]

"""Quantising on the user's own videos: what is looked at, what is decided, and what it cost. Imported only when data or a gate is asked for."""

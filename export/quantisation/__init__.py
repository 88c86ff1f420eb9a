"""quantisation."""

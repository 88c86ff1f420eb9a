def write_checkpoint(*a, **k): pass

"""Lightning callbacks; imported as ``talklora_pl.callbacks``."""

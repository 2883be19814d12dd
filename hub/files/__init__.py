"""Files of the hub: written atomically, hashed, parsed."""

"""Training of experts, gates and inventories of skills."""

"""States of methods: made once, stored, pinned in lock files and found again."""

"""Which experts each token chose: recorded, summed up, and shown as a page."""

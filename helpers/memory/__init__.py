"""Find where the bytes go: predicted by formula, counted storage by storage, read from the driver."""

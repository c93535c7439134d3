"""Process, device, files, randomness and errors."""

"""Images, films and exports from a trained generator."""
